"""Take channels out of a program step by step, with the verifier after each; and run a plan among the passes
of others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.export import ExportedProgram

from fasp_fx.analysis import (
    Analysis,
    PruningPlan,
    Walk,
    analyze_program,
    check_structure,
    gone_of,
)
from fasp_fx.base import tolerable, without_collections
from fasp_fx.capturing import Program, capture, record
from fasp_fx.errors import ArgumentError, FaspError, VerificationError, first_line

from ._adjust import keep_dense_count, pad_value_heads, skip_blocks
from ._foreign import name_of, run_foreign
from ._pruned_module import finish, program_now
from ._remove_channels import remove_channels
from ._split import NAME, split
from ._verify import verify

#: of the program that is to be rewritten, the analysis of the program that all steps started from, what it
#: does on the numbers of that, and which of these numbers go; returns the same object if there is nothing to
#: do
Step = Callable[[Program, Analysis, Walk, np.ndarray], Program]

_STEPS: tuple[Step, ...] = (
    skip_blocks,
    keep_dense_count,
    remove_channels,
    pad_value_heads,
)


@without_collections()
def remove(analysis: Analysis, gone: np.ndarray, restored: Mapping[str, Tensor] | None = None) -> Program:
    """The analysed program without some channels: it computes what the dense one computes with the removed
    activations at zero, and with the restored weights in place of its own.

    Args:
        gone: for every channel number, whether it is removed.
        restored: repaired weights by canonical name, of the dense shapes.

    Raises:
        VerificationError: a step failed, or left a program that does not compute what the analysis says;
            names the step and the node.

    Examples:
        >>> gone = np.zeros(len(analysis.labels), dtype=bool)  # of every channel number
        >>> fasp_fx.passes.remove(analysis, gone).parameters().keys() == captured.program.parameters().keys()
        True
    """
    program, walk = restore_weights(analysis.program, restored or {}), analysis.walk
    for step in _STEPS:
        with _named(step.__name__):
            rewritten = step(program, analysis, walk, gone)
            if rewritten is not program:
                program, walk = rewritten, _verified(rewritten, analysis)
    return program


def restore_weights(program: Program, restored: Mapping[str, Tensor]) -> Program:
    """The program with other values of some weights, under all their names."""
    if not restored:
        return program
    program = program.with_own_weights()
    aliases, weights = program.aliases(), program.weights()
    for name, value in restored.items():
        if value.shape != weights[name].shape:
            raise VerificationError(
                f"the restored weight '{name}' has shape {tuple(value.shape)}, and not the dense one"
            )
        program.replace_weight(aliases[name], value)
    return program


def split_fused(program: Program, analysis: Analysis) -> Program | None:
    """Split fused producers that stand in the way; ``None`` if there is nothing to do.

    Examples:
        >>> fasp_fx.passes.split_fused(captured.program, analysis) is None  # no fused weight here
        True
    """
    with _named(NAME):
        rewritten = split(program, analysis)
        if rewritten is program:
            return None
        _verified(rewritten, analysis)
        record(rewritten.module, everything=False)
    return replace(rewritten, numbers={})


def _verified(program: Program, analysis: Analysis) -> Walk:
    program.module.graph.lint()
    program.module.recompile()
    return verify(program, analysis)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors bear the name of the pass."""
    try:
        yield
    except tolerable(FaspError, RuntimeError, AttributeError) as error:  # or what fx says of a broken graph
        what = error if isinstance(error, FaspError) else first_line(error)
        raise VerificationError(f"pass '{name}' failed: {what}") from error


@dataclass(frozen=True)
class Prune:
    """Apply a plan: ``Prune(plan)(exported)`` is an exported program without the plan's channels, which
    computes what the dense program computes with the removed activations at zero. A plan holds no repaired
    weights.

    The program is of the model that the plan was made for; foreign passes may have run on it in the same
    :class:`Pipeline`.

    Examples:
        >>> exported = torch.export.export(model, (x,))
        >>> fasp_fx.passes.Prune(result.plan)(exported).state_dict["0.weight"].shape
        torch.Size([20, 8])
    """

    plan: PruningPlan

    def __call__(self, exported: ExportedProgram) -> ExportedProgram:
        """See :class:`Pipeline`."""
        return Pipeline([self])(exported)


class Pipeline:
    """Runs a plan among foreign passes. Its input stays as it was.

    What is removed is held against the channel numbers of the analysis (:func:`~fasp_fx.passes.verify`).
    After a foreign pass the program is analysed anew: weights it brought go with the channels they meet, and
    a plan that does not fit any more is refused. What no analysis can see, such as another value, is seen on
    the example inputs: each output stays within ``tolerance``. Nodes that a pass wrote, ours or foreign,
    carry its name in ``node.meta["fasp_fx_pass"]``.

    Args:
        passes: ``Prune(plan)``, once at most, and foreign ones: ``PassBase`` instances, or functions of a
            ``GraphModule`` (returning one, a ``PassResult``, or ``None``). A function of an
            ``ExportedProgram`` is called on what goes into a pipeline, or comes out of it.
        tolerance: what a foreign pass may change of an output of real numbers, as a fraction of its largest
            value. ``None``: the square root of the output type's precision (3e-4 for float32); 0: outputs
            are not compared.

    Examples:
        >>> from fasp_fx.passes import Pipeline, Prune
        >>> exported = torch.export.export(model, (x,))
        >>> smaller = Pipeline([Prune(result.plan)])(exported)
        >>> {name: tuple(weight.shape) for name, weight in smaller.state_dict.items() if weight.dim() == 2}
        {'0.weight': (20, 8), '2.weight': (16, 20), '4.weight': (4, 16)}
    """

    def __init__(
        self, passes: Sequence[Prune | Callable[[Any], Any]], tolerance: float | None = None
    ) -> None:
        self.passes, self.tolerance = list(passes), tolerance
        plans = [step.plan for step in self.passes if isinstance(step, Prune)]
        if len(plans) > 1:
            raise ArgumentError("a pipeline applies one plan; use one for each, one after the other")
        self.plan = plans[0] if plans else None

    def __call__(self, exported: ExportedProgram) -> ExportedProgram:
        """Run all passes; returns the given object if there was nothing to do.

        Raises:
            VerificationError: a pass failed or left a program that does not compute what the analysis says;
                names the pass and the node.
            PlanError: the plan is for another model, or does not fit what foreign passes have made of it.
            ArgumentError, CaptureError: the exported program cannot be read (it carries no example inputs,
                say).
        """
        plan = self.plan
        program = capture(exported, fold=plan is not None)  # without a plan, no weight becomes another
        if plan is not None:
            check_structure(plan, program.parameters())
            if plan.splits:
                program = analyze_program(program, split_fused, plan.granularity, plan.include).program
        start, brought = program, None
        for step in self.passes:
            if isinstance(step, Prune):
                how = step.plan.granularity, step.plan.include
                analysis = replace(analyze_program(program, None, *how), brought=brought)
                program = remove(analysis, gone_of(step.plan, analysis))
            else:
                with _named(name_of(step)):
                    rewritten = run_foreign(step, program, self.tolerance)
                brought = (brought or frozenset()) | rewritten.weights().keys() - program.weights().keys()
                program = rewritten
        return exported if program is start else program_now(finish(program))
