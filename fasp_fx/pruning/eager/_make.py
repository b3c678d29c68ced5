"""Make the caller's own module smaller by the plan of a result."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...analysis import plan as plans
from ...analysis._analysis import analyze_program
from ...analysis.plan import PruningPlan
from ...base._stamps import WRITTEN_BY
from ...base._tolerable import tolerable
from ...base.compat import pytree
from ...capturing import capture, recorded_shapes
from ...capturing._compare_with_model import called, trouble_with
from ...capturing._program import Program
from ...capturing._unchanged import noting_reads, rewound, said_of_reads
from ...errors import ArgumentError, EagerError, first_line
from ...passes import PadValueHeads, split_fused
from ...passes._pruned_module import PrunedModule, finish
from ._copy import copied, cuts, keep_from_saving, twin
from ._same import Difference, first_difference, other_sizes
from ._sizes import is_within, write, write_said
from ._traced import settle, traced


def eager(pruned: nn.Module, plan: PruningPlan, model: nn.Module) -> nn.Module:
    """See :meth:`fasp_fx.Result.eager`; ``pruned`` and ``plan`` are the result's."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be the nn.Module that was pruned, not {type(model).__name__}")
    _check(pruned, plan, model)
    made = _Copy(pruned, plan, model)
    with rewound(model), _evaluating(model, made.module):
        wrong = made.settled()
        if wrong is not None:
            group = _group(plan, wrong)
            keep = f", or keep the group '{group}' and its like by exclude=" if group else ""
            raise EagerError(
                f"no copy of {type(model).__name__} computes what the pruned program does: {wrong.said}; use"
                f' result.module, or prune whole heads (granularity=("channel", "head")){keep}, or see what a'
                " class cannot say in docs/eager.md",
                group,
            )
        for training in (False, True):
            made.run(training)
    keep_from_saving(made.module)
    return made.module


class _Copy:
    """A copy of the caller's model that holds the weights of a result, and the program that it is to be.

    Raises:
        EagerError: the result holds no example inputs, on which the copy could be captured.
    """

    def __init__(self, pruned: nn.Module, plan: PruningPlan, model: nn.Module) -> None:
        assert isinstance(pruned, PrunedModule)
        self.plan, self.model, self.origin = plan, model, pruned.fasp_fx_origin
        if self.origin.example is None:
            raise EagerError(
                "the program of the result holds no example inputs, on which a copy could be captured; use"
                " result.module"
            )
        device = next((tensor.device for tensor in [*pruned.parameters(), *pruned.buffers()]), None)
        example = pytree.tree_map(
            lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, self.origin.example
        )
        self.program = Program(pruned, self.origin.signature, example)
        self.args, self.kwargs = self.program.call()
        #: what it computes, as it was captured and rewritten
        self.graph = self.origin.body()[0]
        self.module = copied(model, pruned, plan)

    def captured(self, module: nn.Module) -> Program:
        """A module of the caller's, captured as the program was."""
        return capture(
            module,
            self.args,
            self.kwargs,
            dynamic_shapes=lambda args, kwargs: recorded_shapes(self.graph, (args, kwargs), settled=True),
        )

    def settled(self) -> Difference | None:
        """Give the attributes the sizes that the weights have; what is wrong with the copy then."""
        wrong = self.difference()
        if wrong is None:
            return None
        dense = twin(self.model)
        shared = {id(value) for inner in self.model.modules() for value in vars(inner).values()}
        with traced(dense, shared) as log:
            graph = self.captured(dense).module.graph
        assignments, torn = settle(graph, self.graph, log, cuts(self.model, self.module))
        for assignment in assignments:
            write(self.module, assignment)
            wrong = self.difference()
            if wrong is None:
                return None
        return replace(wrong, said=f"{wrong.said}; {torn}") if torn else wrong

    def difference(self) -> Difference | None:
        """Where the copy computes anything else than the program, if it does.

        Raises:
            EagerError: it reads the model.
        """
        plan, read = self.plan, list[str]()
        try:
            write_said(self.model, self.module)
            with noting_reads(self.model, self.module) as read:
                found = self.captured(self.module)
            written = {node.meta.get(WRITTEN_BY) for node in self.program.module.graph.nodes}
            if plan.splits or plan.copies or PadValueHeads.name in written:
                analysis = analyze_program(found, split_fused, plan.granularity, plan.include)
                found = PadValueHeads().rewrite(analysis.program, analysis)
            again = finish(found)
        except tolerable(Exception) as error:  # a module raises what it likes
            self._refuse_reads(read)
            cause = error.__cause__ or error
            path = _failing(cause, self.module)
            where = f"'{path}' ({type(self.module.get_submodule(path)).__name__}) " if path else ""
            return Difference(f"{where}fails: {type(cause).__name__}: {first_line(cause)}", path)
        self._refuse_reads(read)
        origin = again.fasp_fx_origin
        return first_difference(origin.body()[0], again, self.graph, self.program.module) or other_sizes(
            origin.facts, self.origin.facts
        )

    def run(self, training: bool) -> None:
        """Run the copy as it is in one of its modes.

        Raises:
            EagerError: it reads the caller's model, gives something else than its own graph, or fails where
                the model runs.
        """
        try:
            with rewound(self.model), noting_reads(self.model, self.module) as read:
                found = self._called(self.module.train(training))
        except tolerable(Exception) as error:  # a module raises what it likes
            if training and not self._runs(self.model.train()):
                return  # as norms do with a single sample
            raise EagerError(
                f"the copy fails in {'training' if training else 'evaluation'} mode, where the model runs:"
                f" {type(error).__name__}: {first_line(error)}; use result.module, or prune with round_to=8,"
                " if a kernel takes whole 16 bytes alone"
            ) from error
        self._refuse_reads(read)
        trouble = None if training else trouble_with(self.program, found, self.args, self.kwargs)
        if trouble is not None:
            raise EagerError(
                f"the pruned program {trouble}, which a copy computes when called; use result.module"
            )

    def _called(self, module: nn.Module) -> Any:
        return called(self.program, module, self.args, self.kwargs)[0]

    def _runs(self, module: nn.Module) -> bool:
        try:
            self._called(module)
        except tolerable(Exception):  # as above
            return False
        return True

    def _refuse_reads(self, read: list[str]) -> None:
        if read:
            raise EagerError(f"{said_of_reads(self.model, read)} or use result.module")


@contextlib.contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode, and as they were afterwards."""
    modes = [(inner, inner.training) for module in modules for inner in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for inner, training in modes:
            inner.training = training


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


def _group(plan: PruningPlan, wrong: Difference) -> str | None:
    """The group that is to be kept: one that loses channels of each head, or one where the copy differs."""
    parts = {group: (*group.producers, *group.consumers) for group in plan.groups}
    of_heads = (
        group.name
        for group, own in parts.items()
        if group.granularity == "channel" and group.blocks > 1 and all(part.block_dim is None for part in own)
    )
    failing = (
        group.name
        for group, own in parts.items()
        if wrong.path and any(is_within(part.name.rpartition(".")[0], wrong.path) for part in own)
    )
    return next(of_heads, None) or next(failing, None)


__all__ = ["eager"]
