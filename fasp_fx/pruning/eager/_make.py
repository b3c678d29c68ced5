"""Make the caller's own module smaller by the plan of a result."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

from ...analysis import plan as plans
from ...analysis._analysis import analyze_program
from ...analysis.build._depth import DEPTH
from ...analysis.groups import APPROXIMATE, EXEMPT
from ...analysis.plan import PruningPlan
from ...base._stamps import WRITTEN_BY
from ...base._tolerable import tolerable
from ...base.compat import pytree
from ...capturing import capture, recorded_shapes
from ...capturing._compare_with_model import called, trouble_with
from ...capturing._program import Program
from ...capturing._unchanged import noting_reads, rewound, said_of_reads
from ...errors import ArgumentError, EagerError, first_line
from ...passes import KeepDenseCount, PadValueHeads, PinAttentionScale, split_fused
from ...passes._finish import finish
from ...passes._pruned_module import Origin, PrunedModule
from ._copy import Copied, copied, twin
from ._same import Difference, first_difference, other_sizes
from ._saving import keep_from_saving
from ._settle import settle
from ._sizes import is_within, records, write, write_said
from ._traced import traced

#: widths that are multiples of it serve all kernels
FULL = 8


def eager(pruned: nn.Module, plan: PruningPlan, model: nn.Module) -> nn.Module:
    """See :meth:`fasp_fx.Result.eager`; ``pruned`` and ``plan`` are the result's."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be the nn.Module that was pruned, not {type(model).__name__}")
    _check(pruned, plan, model)
    made, expected = copied(model, pruned, plan), _Expected.of(pruned, plan)
    with rewound(model), _evaluating(model), _evaluating(made.module):
        wrong = _written(made, expected)
        if wrong is not None:
            remedy, group = _remedy(pruned, plan, wrong, model)
            kind = type(model).__name__
            raise EagerError(
                f"no copy of {kind} computes what the pruned program does: {wrong.said}; {remedy}", group
            )
        for training in (False, True):
            _check_run(made, expected, training)
    keep_from_saving(made.module)
    return made.module


@dataclass(frozen=True)
class _Expected:
    """The pruned program that a copy is to be.

    Attributes:
        program: over the module of the result.
        origin: what that was made of.
        args, kwargs: the example inputs of the caller's ``forward``.
    """

    plan: PruningPlan
    program: Program
    origin: Origin
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module, plan: PruningPlan) -> _Expected:
        """The program of a result, with example inputs where its weights are.

        Raises:
            EagerError: it holds none.
        """
        assert isinstance(module, PrunedModule)
        example = module.fasp_fx_origin.example
        if example is None:
            raise EagerError(
                "the program of the result holds no example inputs, on which a copy could be captured; use"
                " result.module"
            )
        device = next((tensor.device for tensor in [*module.parameters(), *module.buffers()]), None)
        example = pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, example)
        program = Program(module, module.fasp_fx_origin.signature, example)
        return cls(plan, program, module.fasp_fx_origin, *program.call())

    @cached_property
    def graph(self) -> fx.Graph:
        """What it computes, as it was captured and rewritten."""
        return self.origin.body()[0]

    def captured(self, module: nn.Module) -> Program:
        """A module of the caller's, captured as the program was."""
        return capture(
            module,
            self.args,
            self.kwargs,
            dynamic_shapes=lambda args, kwargs: recorded_shapes(self.graph, (args, kwargs), settled=True),
        )

    def difference(self, made: Copied) -> Difference | None:
        """Where a copy computes anything else, if it does.

        Raises:
            EagerError: it reads the model.
        """
        plan, module, read = self.plan, made.module, list[str]()
        try:
            write_said(made.model, module)
            with noting_reads(made.model, module) as read:
                found = self.captured(module)
            written = {node.meta.get(WRITTEN_BY) for node in self.program.module.graph.nodes}
            if plan.splits or plan.copies or PadValueHeads.name in written:
                analysis = analyze_program(found, split_fused, plan.granularity, plan.include)
                found = PadValueHeads().rewrite(analysis.program, analysis)
            again = finish(found)
        except tolerable(Exception) as error:  # a module raises what it likes
            _refuse_reads(made.model, read)
            cause = error.__cause__ or error
            path = _failing(cause, module)
            where = f"'{path}' ({type(module.get_submodule(path)).__name__}) " if path else ""
            return Difference(f"{where}fails: {type(cause).__name__}: {first_line(cause)}", path)
        _refuse_reads(made.model, read)
        origin = again.fasp_fx_origin
        return first_difference(origin.body()[0], again, self.graph, self.program.module) or other_sizes(
            origin.facts, self.origin.facts
        )


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """A module in evaluation mode, and as it was afterwards."""
    modes = [(inner, inner.training) for inner in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for inner, training in modes:
            inner.training = training


def _written(made: Copied, expected: _Expected) -> Difference | None:
    """Give the attributes of a copy the sizes that its weights have; what is wrong with it then."""
    wrong = expected.difference(made)
    if wrong is None:
        return None
    dense = twin(made.model)
    with traced(dense, {id(record) for record in records(made.model)}) as log:
        graph = expected.captured(dense).module.graph
    settled = settle(graph, expected.graph, log, made.cuts())
    for assignment in settled.assignments():
        write(made.module, assignment)
        wrong = expected.difference(made)
        if wrong is None:
            return None
    return replace(wrong, said=f"{wrong.said}; {settled.torn}") if settled.torn else wrong


def _check_run(made: Copied, expected: _Expected, training: bool) -> None:
    """Run a copy as it is in one of its modes.

    Raises:
        EagerError: it reads the caller's model, gives something else than its own graph, or fails where the
            model runs.
    """
    program, args, kwargs = expected.program, expected.args, expected.kwargs
    module = made.module.train(training)
    try:
        with rewound(made.model), noting_reads(made.model, module) as read:
            found, _ = called(program, module, args, kwargs)
    except tolerable(Exception) as error:  # a module raises what it likes
        if training and not _runs(made.model.train(), expected):
            return  # as norms do with a single sample
        raise EagerError(
            f"the copy fails in {'training' if training else 'evaluation'} mode, where the model runs:"
            f" {type(error).__name__}: {first_line(error)}; use result.module, or prune with"
            f" round_to={FULL}, if a kernel takes whole 16 bytes alone"
        ) from error
    _refuse_reads(made.model, read)
    trouble = None if training else trouble_with(program, found, args, kwargs)
    if trouble is not None:
        raise EagerError(
            f"the pruned program {trouble}, which a copy computes when called; use result.module"
        )


def _refuse_reads(model: nn.Module, read: list[str]) -> None:
    if read:
        raise EagerError(f"{said_of_reads(model, read)} or use result.module")


def _runs(model: nn.Module, expected: _Expected) -> bool:
    """Whether a model runs on the example inputs as it is."""
    try:
        called(expected.program, model, expected.args, expected.kwargs)
    except tolerable(Exception):  # as above
        return False
    return True


def _check(pruned: nn.Module, plan: PruningPlan, model: nn.Module) -> None:
    """Refuse a model that the plan was not made for. The plan was made for what the program holds, which
    lacks what a capture leaves out.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = {name for name, _ in pruned.named_parameters(remove_duplicate=False)}
    known |= {split.source for split in plan.splits} | {
        source for weight in plan.folds for source in weight.sources
    }
    found = [
        plans.fingerprint(parameters),
        plans.fingerprint({name: tensor for name, tensor in parameters.items() if name in known}),
    ]
    plans.check_fingerprint(plan, plan.fingerprint if plan.fingerprint in found else found[0])


def _failing(error: BaseException, module: nn.Module) -> str | None:
    """The innermost submodule whose methods were running when an error was raised."""
    paths = {id(inner): path for path, inner in module.named_modules()}
    running = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((paths[id(owner)] for owner in reversed(running) if id(owner) in paths), None)


def _remedy(
    pruned: nn.Module, plan: PruningPlan, wrong: Difference, model: nn.Module
) -> tuple[str, str | None]:
    """What can be done instead, and what of the program no module has where that can be told; and the group
    that is to be kept.
    """
    assert isinstance(pruned, PrunedModule)
    written = {node.meta.get(WRITTEN_BY) for node in pruned.graph.nodes}
    if KeepDenseCount.name in written:
        why = (
            "the program goes on to divide by the dense count of the channels that a norm or mean has lost,"
            " and no module of the model does"
        )
        return f"{why}; use result.module, or prune without '{APPROXIMATE}' in include=", None
    if EXEMPT in plan.include and PinAttentionScale.name in written:
        why = "the program keeps the scale of an attention whose heads have become narrower"
        return f"{why}; use result.module, or prune without '{EXEMPT}' in include=", None
    if DEPTH in plan.include and any(0 in parameter.shape for parameter in pruned.parameters()):
        why = "the program leaves a block out, which the model's own module goes on to run"
        return f"{why}; use result.module, or prune without '{DEPTH}' in include=", None
    parts = {
        group.name: (*group.producers, *group.consumers)
        for group in plan.groups
        if group.granularity == "channel" and group.blocks > 1
    }
    heads = next((name for name, own in parts.items() if all(part.block_dim is None for part in own)), None)
    if heads is not None:
        whole = 'granularity=("head",) or ("channel", "head")'
        return (
            f"use result.module, or prune whole heads ({whole}) where the group '{heads}' has lost channels"
            " of each, or keep it and its like by exclude="
        ), heads
    computed = next(
        (path for path, part in model.named_modules() if nn.utils.parametrize.is_parametrized(part)), None
    )
    if computed is not None:
        return (
            f"use result.module, or call torch.nn.utils.parametrize.remove_parametrizations on '{computed}'"
            " before pruning"
        ), None
    failing = next(
        (
            group.name
            for group in plan.groups
            for part in (*group.producers, *group.consumers)
            if wrong.path and is_within(part.name.rpartition(".")[0], wrong.path)
        ),
        None,
    )
    if failing is None:
        return "use result.module", None
    return f"use result.module, or keep the group '{failing}' and its like by exclude=", failing


__all__ = ["eager"]
