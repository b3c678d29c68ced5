"""One model under check: its analysis, a plan drawn for it, the pruned result and the calls they are compared
on, each made once; what a check of it says. How what may remember its calls is called, and which channel sets
go, drawn at random.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import fasp_fx
from fasp_fx.analysis import Analysis, PruningPlan, gone_of, program_fingerprint
from fasp_fx.base import pytree, tensors_in, tolerable
from fasp_fx.calibration import Decision
from fasp_fx.errors import FaspError, NothingPrunableError
from fasp_fx.pruning import make_plan

from .oracle import Masked, callable_of, tensors_of

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Case:
    """One model under check.

    Attributes:
        model: the caller's model, which no check changes.
        args, kwargs: its example inputs.
        sparsity: what to prune by; ``None`` draws how many channels each group loses.
        others: further calls, of other shapes, to compare on.
        options: further arguments of :func:`fasp_fx.prune`.
        tolerance: the largest relative error that counts as equal.
        seed: which channels go.
        capture_options, prune_options, choice: the options that speak of the capture, of the pruning, and of
            what may go (granularity and included groups).
    """

    model: nn.Module | ExportedProgram
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sparsity: float | None
    others: Sequence[Call]
    options: dict[str, Any]
    tolerance: float
    seed: int
    compile: bool = False

    def __post_init__(self) -> None:
        self.worst, self.seen, self.compared = 0.0, float("inf"), 0
        options = self.options.items()
        self.capture_options = {name: value for name, value in options if name in ("dynamic_shapes", "state")}
        self.prune_options = {name: value for name, value in options if name not in self.capture_options}
        self.choice: dict[str, Any] = {
            name: tuple(value) for name, value in options if name in ("granularity", "include")
        }
        self.before = {name: tensor.detach().clone() for name, tensor in tensors_of(self.dense).items()}

    @cached_property
    def dense(self) -> nn.Module:
        """The model as a callable module."""
        return callable_of(self.model)

    @cached_property
    def reference(self) -> nn.Module:
        """The model that has the weights a plan names: the model itself, or what removing nothing makes of it
        where weights were folded, or tensors that the model makes in its forward are cut.

        That the latter computes what the model does is a check of its own.
        """
        names = {*tensors_of(self.dense)}
        cut = {
            member.name for group in self.analysis.chosen for member in (*group.producers, *group.consumers)
        }
        return self.dense if not self.captured.folds and cut <= names else callable_of(self.untouched.module)

    @cached_property
    def analysis(self) -> Analysis:
        """The analysis of the model."""
        analysis = fasp_fx.analyze(self.once, **self.choice)
        assert isinstance(analysis, Analysis)
        return analysis

    def apply(self, plan: PruningPlan, model: Any = None) -> fasp_fx.Result:
        """Replay a plan on the model, or on another."""
        example = () if model is None else (self.args, self.kwargs)
        options = {} if model is None else self.capture_options
        return fasp_fx.apply(self.once if model is None else model, plan, *example, **options)

    @cached_property
    def once(self) -> fasp_fx.Captured:
        """The model captured once, for all checks: a capture survives any number of prunings unchanged."""
        return fasp_fx.capture(self.model, self.args, self.kwargs, **self.capture_options)

    @cached_property
    def captured(self) -> Any:
        """The program as captured, before anything is split or removed."""
        return self.once.program

    @cached_property
    def untouched(self) -> fasp_fx.Result:
        """The result of removing nothing."""
        return self.apply(PruningPlan(program_fingerprint(self.captured), (), 0.0, **self.choice))

    @cached_property
    def plan(self) -> PruningPlan:
        """The plan the checks are made with: the one of the sparsity asked for, or a drawn one.

        Raises:
            Skipped: nothing of the model can be pruned.
        """
        if self.sparsity is not None:
            return self.result.plan
        chosen = draw_sets(self.analysis, self.random)
        if not chosen.any():
            raise Skipped("nothing of this model can be pruned")
        return self.plan_of(chosen)

    @cached_property
    def result(self) -> fasp_fx.Result:
        """The pruned model.

        Raises:
            Skipped: nothing of the model can be pruned.
        """
        if self.sparsity is None:
            return self.apply(self.plan)
        options = {"score": "random", "restore": None, **self.prune_options}
        try:
            return fasp_fx.prune(self.once, sparsity=self.sparsity, **options)
        except NothingPrunableError as error:
            raise Skipped(str(error)) from error

    @cached_property
    def masked(self) -> Masked:
        """The dense model with what the plan removes multiplied by zero."""
        return Masked(self.reference, self.plan)

    # --- drawing what goes

    @cached_property
    def random(self) -> np.random.Generator:
        """The source of everything drawn for this case."""
        return np.random.default_rng(self.seed)

    def plan_of(self, chosen: np.ndarray) -> PruningPlan:
        """The plan that removes these channel sets."""
        return make_plan(self.captured, self.analysis, Decision(chosen[self.analysis.labels]))

    def chosen(self) -> np.ndarray:
        """The channel sets that the plan removes."""
        sets = np.arange(int(self.analysis.labels.max(initial=-1)) + 1)
        return np.isin(sets, self.analysis.labels[gone_of(self.plan, self.analysis)])

    # --- calls

    @cached_property
    def calls(self) -> list[Call]:
        """The example, and calls of other shapes, and of tensors that lie otherwise, which the dense model
        takes.
        """
        calls: list[Call] = [(self.args, self.kwargs)]
        for call in [*self.others, pytree.tree_map_only(Tensor, _turned, calls[0]), *_resized(calls[0])]:
            try:
                self.run(self.dense, call)
            except tolerable(Exception):
                continue
            calls.append(call)
        return calls

    @cached_property
    @torch.no_grad()
    def times(self) -> int:
        """How often each call is repeated: a model that writes into its buffers is called twice in a row,
        from the same buffers each time.
        """
        return 2 if remembers(self.dense, self.args, self.kwargs) else 1

    def run(self, called: Callable[..., Any], call: Call) -> Any:
        """The outputs of one call, without gradients; of a model that remembers, those of two
        calls in a row.
        """
        with torch.no_grad():
            return in_a_row(called, *call, self.times)


def _turned(leaf: Tensor) -> Tensor:
    """A copy whose dimensions lie in reverse order in memory, which copies of it keep."""
    dims = range(leaf.dim())[::-1]
    return leaf.permute([*dims]).contiguous().permute([*dims]) if leaf.layout is torch.strided else leaf


def _resized(call: Call) -> list[Call]:
    """The example with another batch, and with other batches and other second dimensions, multiples among
    them: its own entries, repeated in turn.
    """
    leaves = [leaf for leaf in tensors_in(call) if leaf.dim()]
    batches = {leaf.shape[0] for leaf in leaves}
    lengths = {leaf.shape[1] for leaf in leaves if leaf.dim() > 1}
    if len(batches) != 1:
        return []
    (batch,), (length, *_) = batches, [*lengths, 0]
    changes = [{0: (batch, batch + 1)}]
    if len(lengths) == 1:
        changes += [{0: (batch, batch + 2), 1: (length, length + 1)}, {1: (length, 2 * length)}]
    return [_resize(call, change) for change in changes]


def _resize(call: Call, changes: dict[int, tuple[int, int]]) -> Call:
    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for dim, (old, new) in changes.items():
            if dim < leaf.dim() and leaf.shape[dim] == old:
                leaf = leaf.index_select(dim, torch.arange(new, device=leaf.device) % old)
        return leaf

    return pytree.tree_map(change, call)


# --- calls of what may remember them: several in a row, and without a trace of them afterwards


@contextmanager
def rewinding(module: nn.Module) -> Iterator[None]:
    """Afterwards the buffers of a module hold what they held before."""
    buffers = [(buffer, copied(buffer.detach())) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, before in buffers:
            if not alike(buffer, before):
                # A write of the same is a write to those who count them.
                buffer.detach().copy_(before)


def in_a_row(called: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], times: int) -> Any:
    """The outputs of one call, or a list of those of several calls in a row.

    Args:
        called: a module, or what holds one as its ``module``.
        times: how often; with 1 the module is taken to remember nothing.
    """
    if times == 1:
        return with_own(called, args, kwargs)
    module = called if isinstance(called, nn.Module) else getattr(called, "module", None)
    assert isinstance(module, nn.Module), f"{called!r} has no buffers to rewind"
    with rewinding(module):
        return [copied(with_own(called, args, kwargs)) for _ in range(times)]


def remembers(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call leaves anything in the buffers of a module; it is rewound."""
    before = copied(list(module.buffers()))
    with rewinding(module):
        with_own(module, args, kwargs)
        return not all(map(alike, before, module.buffers()))


def alike(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same, NaN included."""
    return torch.equal(first.detach().nan_to_num(), second.detach().nan_to_num())


def with_own(called: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call with copies of the inputs returns: a model may write into them."""
    own_args, own_kwargs = copied((args, kwargs))
    return called(*own_args, **own_kwargs)


def copied(value: Any) -> Any:
    """Inputs, or outputs, that the next call cannot write into."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


# --- which channel sets go


def draw_sets(analysis: Analysis, random: np.random.Generator) -> np.ndarray:
    """Of every block of each group that is pruned a random number of channel sets, the same in all its
    blocks, and at least one in all.

    Every other block that may go as a whole does. Shape ``[sets]``, boolean.
    """
    chosen = np.zeros(int(analysis.labels.max(initial=-1)) + 1, dtype=bool)
    groups = [group for group in analysis.chosen if group.width > 1 and group.most_lost(1)]
    sure = int(random.integers(len(groups))) if groups else -1
    for index, group in enumerate(groups):
        count = _draw_count(group.most_lost(1), group.multiple, int(index == sure), random)
        if not group.needed and random.integers(2):
            count = group.width
        for block in np.unique(group.block_of):
            chosen[random.choice(group.sets[group.block_of == block], count, replace=False)] = True
    return chosen


def draw_part(analysis: Analysis, chosen: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Some of the chosen channel sets, at least one, and the same number from every block of a group."""
    part = np.zeros_like(chosen)
    losing = [group for group in analysis.groups if chosen[group.sets].any()]
    sure = int(random.integers(len(losing))) if losing else -1
    for index, group in enumerate(losing):
        blocks = [
            group.sets[(group.block_of == block) & chosen[group.sets]] for block in np.unique(group.block_of)
        ]
        count = _draw_count(len(blocks[0]), group.multiple, int(index == sure), random)
        if count == group.width - 1 and len(blocks[0]) == group.width:
            count = group.width  # a dimension of one channel is none that a second step could take it from
        for block in blocks:
            part[random.choice(block, count, replace=False)] = True
    return part


def _draw_count(most: int, step: int, least: int, random: np.random.Generator) -> int:
    """``most``, or less by a multiple of ``step``; 0 unless the ``least`` number of steps is 1."""
    steps = -(-most // step)
    return max(most - step * (steps - int(random.integers(least, steps + 1))), 0)


# --- what a check of a program says, and the error it raises


@dataclass(frozen=True)
class Broken:
    """One invariant that does not hold, and how that shows."""

    invariant: str
    message: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.message}"


@dataclass(frozen=True)
class ProgramVerdict:
    """What was checked on one model.

    Attributes:
        model: the name of its class.
        checked: the invariants that were held against it, in order.
        skipped: invariants that say nothing of this model, with the reason.
        broken: those that do not hold.
        removed: how many channel sets the plan took.
        sparsity: the sparsity that this is.
        calls: how many calls, of how many input shapes, the pruned program was compared on.
        error: the largest relative error against the masked dense model.
        seen: the smallest relative change that masking makes to the outputs of a call; where it is 0 the
            comparison proves little.
        seed: what the choice of channels was drawn with.

    Examples:
        >>> verdict = fasp_fx.testing.check_program(model, (x,), invariants=("mask-exact",))
        >>> verdict.ok, verdict.checked
        (True, ('mask-exact',))
    """

    model: str
    checked: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    broken: tuple[Broken, ...] = ()
    removed: int = 0
    sparsity: float = 0.0
    calls: int = 0
    error: float = 0.0
    seen: float = 0.0
    seed: int = 0

    @property
    def ok(self) -> bool:
        """Whether everything that was checked holds."""
        return not self.broken

    def __str__(self) -> str:
        if self.broken:
            return f"{self.model} (seed {self.seed}) breaks " + "; ".join(map(str, self.broken))
        left = (
            f"; skipped {', '.join(f'{name} ({why})' for name, why in self.skipped)}" if self.skipped else ""
        )
        return (
            f"{self.model}: {', '.join(self.checked)} hold; {self.removed} channel sets removed"
            f" ({self.sparsity:.1%}), error {self.error:.1e} over {self.calls} calls{left}"
        )


class CheckFailed(FaspError, AssertionError):
    """A check found something broken; ``verdict`` says what."""

    def __init__(self, verdict: object) -> None:
        super().__init__(str(verdict))
        self.verdict = verdict


class Violation(Exception):
    """Raised inside a check: the invariant does not hold."""


class Skipped(Exception):
    """Raised inside a check: the invariant says nothing of this model."""


def hold(condition: bool, message: str) -> None:
    """Raise :class:`Violation` unless the condition holds."""
    if not condition:
        raise Violation(message)
