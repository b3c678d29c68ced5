"""Hold every invariant of the library against one model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fasp_fx import patterns
from fasp_fx.base import OpOverload, tolerable
from fasp_fx.errors import ArgumentError, CaptureError

from . import _alone, _exact
from ._case import Broken, Call, Case, CheckFailed, ProgramVerdict, Skipped, Violation, hold
from .oracle import callable_of
from .rule import RuleVerdict, check_rule

#: calls per rule; rules are held against more in the tests of the library itself
_EXAMPLES = 12


def rules_held(case: Case) -> None:
    """No rule of an operator in the graph claims more than the operator keeps."""
    targets = {node.target for node in case.captured.module.graph.nodes}
    operators = sorted((target for target in targets if isinstance(target, OpOverload)), key=str)
    rules = ((operator, patterns.lookup(operator)) for operator in operators)
    verdicts = [found for each, rule in rules if rule is not None and (found := _verdict(each, str(rule)))]
    for verdict in verdicts:
        hold(verdict.kind != "claims too much", str(verdict))
    if not verdicts:
        raise Skipped("no operator of the graph has a rule that can be sampled")


@cache
def _verdict(operator: OpOverload, rule: str) -> RuleVerdict | None:
    """The verdict on a rule, once per process; ``None`` for operators of which no call can be made up."""
    try:
        return check_rule(operator, examples=_EXAMPLES)
    except ArgumentError:
        return None


#: the invariants by name, in the order in which they are checked
INVARIANTS: dict[str, Callable[[Case], None]] = {
    "mask-exact": _exact.mask_exact,
    "nothing": _exact.nothing_removed,
    "signature": _alone.signature,
    "plan": _exact.plan_is_true,
    "steps": _exact.two_steps,
    "shapes": _alone.recorded_shapes,
    "unseen": _exact.unseen_operator,
    "rules": rules_held,
    "ties": _alone.ties_stay,
    "restored": _alone.restored,
    "alone": _alone.alone,
}
#: the largest relative error that counts as equal, by the type of the weights
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


def check_program(
    model: nn.Module | ExportedProgram,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    sparsity: float | None = None,
    seed: int = 0,
    invariants: Iterable[str] = tuple(INVARIANTS),
    others: Sequence[Call] = (),
    tolerance: float | None = None,
    compile: bool = False,
    **options: Any,
) -> ProgramVerdict:
    """Prune a model and hold the result against what the library promises.

    Args:
        model: module in evaluation mode, graph module or exported program; it is not changed.
        args, kwargs: example inputs.
        sparsity: what to prune by; ``None`` draws for every prunable group how many channels it loses.
        seed: what is drawn with.
        invariants: names of :data:`INVARIANTS`; all by default.
        others: further calls ``(args, kwargs)`` to compare on; other batches and lengths are tried in any
            case.
        tolerance: the largest relative error that counts as equal; by default 1e-9 for float64, 1e-4 for
            float32, 2e-2 for shorter types.
        compile: also compile the result with ``torch.compile``, which takes long.
        options: passed on to :func:`fasp_fx.prune` and :func:`fasp_fx.analyze` (``dynamic_shapes``,
            ``state``, ``granularity``, …).

    Returns:
        What was checked and how closely it holds.

    Raises:
        CheckFailed: an invariant does not hold; the message names it and shows how. Its ``verdict`` is what
            would have been returned.
        CaptureError, ArgumentError: the model cannot be captured with these inputs, or an invariant is not
            known.

    Examples:
        >>> from fasp_fx.testing import check_program
        >>> check_program(model, (x,), invariants=("signature",)).ok
        True
    """
    wanted = list(invariants)
    unknown = [name for name in wanted if name not in INVARIANTS]
    if unknown:
        raise ArgumentError(f"invariants {unknown} are not known; use some of {list(INVARIANTS)}")
    args = args if isinstance(args, tuple) else (args,)
    tolerance = tolerance if tolerance is not None else _tolerance(callable_of(model))
    case = Case(model, args, dict(kwargs or {}), sparsity, others, options, tolerance, seed, compile)
    checked, skipped, broken = [], [], []
    case.captured  # noqa: B018 - what cannot be captured is no broken invariant
    for name in wanted:
        try:
            INVARIANTS[name](case)
            checked.append(name)
        except Skipped as reason:
            skipped.append((name, str(reason)))
        except Violation as problem:
            broken.append(Broken(name, str(problem)))
        except (CaptureError, KeyboardInterrupt):
            raise
        except tolerable(Exception) as problem:
            broken.append(Broken(name, f"{type(problem).__name__}: {problem}"))
    plan = case.__dict__.get("plan")
    verdict = ProgramVerdict(
        type(model).__name__,
        tuple(checked),
        tuple(skipped),
        tuple(broken),
        sum(group.removed_sets for group in plan.groups) if plan is not None else 0,
        case.__dict__["result"].plan.sparsity if "result" in case.__dict__ else 0.0,
        case.compared,
        case.worst,
        case.seen if case.compared else 0.0,
        seed,
    )
    if broken:
        raise CheckFailed(verdict)
    return verdict


def _tolerance(module: nn.Module) -> float:
    kinds = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    return max((TOLERANCES.get(kind, 2e-2) for kind in kinds), default=1e-4)


def program_test(factory: Callable[[], tuple[Any, ...]], **options: Any) -> Callable[[], None]:
    """A test function for pytest that checks one model.

    ::

        test_prunes = fasp_fx.testing.program_test(lambda: (MyModel().eval(), (torch.randn(2, 8),)))

    Args:
        factory: returns the model and its example inputs: ``(model, args)`` or ``(model, args, kwargs)``.
        options: arguments of :func:`check_program`.

    Examples:
        >>> test_prunes = fasp_fx.testing.program_test(lambda: (model, (x,)), invariants=("mask-exact",))
        >>> test_prunes()
    """

    def test() -> None:
        check_program(*factory(), **options)

    return test
