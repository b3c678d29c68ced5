"""What is removed, as data: readable, replayable, tied to one model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
from torch import Tensor, fx, nn

from fasp_fx.base import Count, fingerprint as fingerprint, from_document, to_document
from fasp_fx.capturing import FoldedWeight, Program, SplitWeight, attribute
from fasp_fx.errors import ArgumentError, PlanError

from ._groups import Coupling, Group, Member, by_block, ranges
from .channels import marked

#: a device in the code of a graph, of which ranks have others
_DEVICE = r"device\(type=.*?\)|cuda:\d+"


@dataclass(frozen=True)
class ParameterSlice:
    """The indices removed along one dimension of one weight; ``name`` is that of
    ``model.named_parameters()``.

    With ``block_dim`` there is one tuple of indices for each of the equal blocks into which that dimension is
    divided: an expert each of a stacked weight, a group each of a grouped convolution.

    Examples:
        >>> removed = result.plan.groups[0].consumers[0]
        >>> print(removed.name, removed.dim, len(removed.removed))
        2.weight 1 12
    """

    name: str
    dim: Count
    removed: tuple[Count, ...] | tuple[tuple[Count, ...], ...]
    block_dim: Count | None = None

    def __post_init__(self) -> None:
        if self.removed and isinstance(self.removed[0], tuple) != (self.block_dim is not None):
            raise PlanError(
                f"what goes of '{self.name}' is by block where it has no block_dim, or not where it has one;"
                " make the plan again"
            )

    def __str__(self) -> str:
        lists = [ranges(block) for block in self.by_block()]
        return f"{self.name}[{self.dim}] - {lists[0] if self.block_dim is None else ' | '.join(lists)}"

    def by_block(self) -> tuple[tuple[int, ...], ...]:
        """The removed indices of each block; one block without ``block_dim``."""
        return (self.removed,) if self.block_dim is None else self.removed  # type: ignore[return-value]

    @property
    def count(self) -> int:
        """How many indices go, over all blocks."""
        return sum(map(len, self.by_block()))


@dataclass(frozen=True)
class PlannedGroup:
    """What one coupled group loses; ``granularity`` says what a channel set of it is.

    Examples:
        >>> (planned,) = result.plan.groups
        >>> print(planned.name, planned.removed_sets, "of", planned.size)
        2.weight 12 of 32
    """

    name: str
    size: Count
    blocks: Count
    removed_sets: Count
    producers: tuple[ParameterSlice, ...]
    consumers: tuple[ParameterSlice, ...]
    granularity: str = "channel"

    @property
    def parts(self) -> tuple[ParameterSlice, ...]:
        """What goes of every weight."""
        return (*self.producers, *self.consumers)

    def __str__(self) -> str:
        left, right = ", ".join(map(str, self.producers)), ", ".join(map(str, self.consumers))
        return f"{self.name}: {self.removed_sets} of {self.size}  {left} -> {right}"


@dataclass(frozen=True)
class WeightShape:
    """A parameter of the model that a plan was made for."""

    name: str
    shape: tuple[Count, ...]


@dataclass(frozen=True)
class FixedBuffer:
    """A buffer or constant that the model reads and does not write into, and the digest of what it held."""

    name: str
    digest: str


@dataclass(frozen=True)
class PruningPlan:
    """Which channels go. It needs no weights to be carried out: :func:`fasp_fx.apply` takes any model that
    has parameters of these names and shapes. Repairs need their values, which ``fingerprint`` tells from
    others.

    Attributes:
        fingerprint: of the weights of the model the plan was made for.
        groups: what each coupled group loses; groups that lose nothing are left out.
        sparsity: the fraction removed of the counted weights.
        splits: fused weights that the result holds in parts.
        result: fingerprint of the model the plan makes, known once it was applied.
        granularity, include: as given to :func:`fasp_fx.prune`.
        folds: weights that the model computes from others, and that the result holds as parameters; the
            groups name them so.
        fixed: what else the model read and did not write into when the plan was made. The plan serves also
            where it holds something else; the repairs of the result do not.
        shapes: the parameters of the model the plan was made for; none in plans from before they were written
            down, which serve the very weights alone.
        earlier: the plans that make that model of the first one, step by step (:meth:`then`).

    Examples:
        >>> plan = fasp_fx.PruningPlan.from_json(result.plan.to_json())
        >>> [(group.name, group.removed_sets) for group in plan.groups]
        [('2.weight', 12)]
    """

    fingerprint: str
    groups: tuple[PlannedGroup, ...]
    sparsity: float
    splits: tuple[SplitWeight, ...] = ()
    result: str | None = None
    granularity: tuple[str, ...] = ("channel",)
    include: tuple[str, ...] = ()
    folds: tuple[FoldedWeight, ...] = ()
    fixed: tuple[FixedBuffer, ...] = ()
    shapes: tuple[WeightShape, ...] = ()
    earlier: tuple[PruningPlan, ...] = ()

    def __repr__(self) -> str:
        return f"PruningPlan({len(self.groups)} groups, sparsity={self.sparsity:.4f})"

    def __str__(self) -> str:
        return "\n".join(map(str, self.groups)) or "nothing is removed"

    def to_json(self) -> str:
        """The plan as JSON."""
        return to_document("plan", asdict(self))

    @staticmethod
    def from_json(text: str) -> PruningPlan:
        """Parse a plan.

        Raises:
            PlanError: not JSON, another format, or a field is missing or of the wrong type; names the place.
        """
        return from_document("plan", PruningPlan, text, "make the plan again", PlanError)

    def slices(self) -> dict[tuple[str, int], frozenset[tuple[int, int]]]:
        """All removed (block, index) pairs by weight and dimension."""
        slices: dict[tuple[str, int], frozenset[tuple[int, int]]] = {}
        for part in (part for group in self.groups for part in group.parts):
            pairs = {(block, index) for block, indices in enumerate(part.by_block()) for index in indices}
            slices[(part.name, part.dim)] = slices.get((part.name, part.dim), frozenset()) | pairs
        return slices

    def then(self, later: PruningPlan) -> PruningPlan:
        """This plan, and then one for the model that it makes, as one plan for the first model: what a chain
        of prunings did, with training between them or not. It makes eager copies on the way.

        Examples:
            >>> small = result.eager(model)  # trained, perhaps
            >>> second = fasp_fx.prune(small, (x,), calibration=batches, sparsity=0.2)
            >>> chain = result.plan.then(second.plan)
            >>> smallest = fasp_fx.apply(model, chain, (x,)).eager(model)
            >>> smallest.load_state_dict(second.eager(small).state_dict())
            <All keys matched successfully>
        """
        return replace(later, earlier=(*self.earlier, replace(self, earlier=()), *later.earlier))

    def after(self, earlier: PruningPlan) -> PruningPlan:
        """This plan, made for the same model as ``earlier``, renumbered for the model that ``earlier`` makes.

        Channels that ``earlier`` already removed are left out, and so are groups of which nothing else goes.
        ``sparsity`` is taken to shrink as the channel sets do that are left to go; :func:`fasp_fx.apply`
        counts it anew.

        Raises:
            PlanError: the plans are for different models, or ``earlier`` was never applied.
        """
        if earlier.fingerprint != self.fingerprint:
            raise PlanError(
                "the two plans were made for different models; only plans for one model can be ordered"
            )
        if earlier.result is None:
            raise PlanError(
                "the earlier plan was never applied, so its result is not known; take the plan of a result"
            )
        renumbering = _Renumbering(earlier)
        # Of another granularity the channel sets are others, whose number nobody has counted.
        sizes = {(group.name, group.granularity): group.removed_sets for group in earlier.groups}
        groups = []
        for group in self.groups:
            producers, consumers = (
                tuple(new for part in side for new in renumbering(part))
                for side in (group.producers, group.consumers)
            )
            if count := sum(part.count for part in (*producers, *consumers)):
                removed = max(round(group.removed_sets * count / sum(part.count for part in group.parts)), 1)
                size = group.size - sizes.get((group.name, group.granularity), 0)
                sized = replace(group, size=size, removed_sets=removed)
                groups.append(replace(sized, producers=producers, consumers=consumers))
        now, then = (sum(group.removed_sets for group in some) for some in (groups, self.groups))
        return PruningPlan(
            earlier.result,
            tuple(groups),
            self.sparsity * now / max(then, 1),
            granularity=self.granularity,
            include=self.include,
        )


class _Renumbering:
    """What goes of a weight, in the indices that an earlier plan leaves."""

    def __init__(self, earlier: PruningPlan) -> None:
        self.removed, self.splits = earlier.slices(), earlier.splits
        #: the experts that are gone, by the stacked weights and the dimensions that they lie along
        self.experts: dict[tuple[str, int | None], set[int]] = {
            (part.name, part.dim): set(part.by_block()[0])
            for group in earlier.groups
            if group.granularity == "expert"
            for part in group.parts
        }

    def __call__(self, part: ParameterSlice) -> list[ParameterSlice]:
        """The slices, one for each part that the earlier plan splits the weight into."""
        before = self.removed.get((part.name, part.dim), frozenset())
        pieces = [split for split in self.splits if split.source == part.name]
        if pieces and pieces[0].dim == part.dim:
            return [each for piece in pieces for each in self._of_rows(part, piece, before)]
        lost = self.experts.get((part.name, part.block_dim), set())
        blocks = tuple(
            _renumber(indices, [index for at, index in before if at == block])
            for block, indices in enumerate(part.by_block())
            if block not in lost  # one block for each expert
        )
        names = [piece.name for piece in pieces] or [part.name]
        return [_slice(name, part.dim, blocks, part.block_dim) for name in names]

    def _of_rows(
        self, part: ParameterSlice, piece: SplitWeight, before: Iterable[tuple[int, int]]
    ) -> list[ParameterSlice]:
        """What goes of a part that has some of the rows."""
        places = {row: index for index, row in enumerate(piece.rows)}
        now = [places[row] for row in part.by_block()[0] if row in places]
        earlier = [places[row] for _, row in before if row in places]
        return [ParameterSlice(piece.name, part.dim, _renumber(now, earlier))] if now else []


def _renumber(removed: Iterable[int], before: Iterable[int]) -> tuple[int, ...]:
    """``removed`` without ``before``, counted in what ``before`` leaves."""
    earlier = np.array(sorted(before), dtype=np.int64)
    others = np.setdiff1d(np.fromiter(removed, dtype=np.int64), earlier)
    return tuple((others - np.searchsorted(earlier, others)).tolist())


def _slice(name: str, dim: int, blocks: tuple[tuple[int, ...], ...], block_dim: int | None) -> ParameterSlice:
    return ParameterSlice(name, dim, blocks[0] if block_dim is None else blocks, block_dim)


def program_fingerprint(program: Program) -> str:
    """The fingerprint of a captured program (before its producers are split): that of the model's parameters,
    of which some may be folded there.
    """
    return fingerprint(program.parameters())


def computed_fingerprint(program: Program) -> str:
    """The fingerprint of all that a captured program (before its producers are split) computes with: what it
    may go by who keeps what was seen of a model.
    """
    # Of what the model computes weights of, buffers may be, which the program does not hold any more.
    folded = {f"folded {weight.name}": attribute(program.module, weight.name) for weight in program.folds}
    fixed = {f"fixed {name}": tensor for name, tensor in program.fixed().items()}
    return fingerprint({**program.parameters(), **folded, **fixed})


def running_fingerprint(program: Program) -> str:
    """The fingerprint of all that a captured program computes with, and of what it computes: what a run goes
    by that goes on where it was interrupted, since the code of a model may have changed meanwhile.
    """
    code = [
        f"{name} {re.sub(_DEVICE, 'device', module.code)}"
        for name, module in program.module.named_modules()
        if isinstance(module, fx.GraphModule)
    ]
    return hashlib.sha256("".join([computed_fingerprint(program), *code]).encode()).hexdigest()


def fixed_of(program: Program) -> tuple[FixedBuffer, ...]:
    """What a captured program reads besides parameters and does not write into."""
    return tuple(
        FixedBuffer(name, fingerprint({"": tensor}))  # in a part of a model it has another name
        for name, tensor in sorted(program.fixed().items())
    )


def check_fixed(plan: PruningPlan, dense: nn.Module) -> None:
    """Refuse a model that does not compute what the one did that was pruned, though it has its parameters.

    Args:
        plan: of the result.
        dense: what is given for the model that was pruned.

    Raises:
        ArgumentError: a buffer that its forward does not write into holds other values; names it.
    """
    buffers = dict(dense.named_buffers(remove_duplicate=False))
    saved = dense.state_dict(keep_vars=True)
    # What is not saved (a table that grows with the longest call so far) follows from what is.
    for fixed in (fixed for fixed in plan.fixed if fixed.name in buffers and fixed.name in saved):
        if fingerprint({"": buffers[fixed.name]}) != fixed.digest:
            raise ArgumentError(
                f"dense is not the model that was pruned: its buffer '{fixed.name}' holds other values than"
                " it did then; pass the model as it was given to prune"
            )


def shapes_of(weights: Mapping[str, Tensor]) -> tuple[WeightShape, ...]:
    """The names and shapes of parameters."""
    return tuple(WeightShape(name, tuple(weight.shape)) for name, weight in sorted(weights.items()))


def strange_weight(plan: PruningPlan, weights: Mapping[str, Tensor]) -> str | None:
    """A weight of the model that a plan was made for which another model lacks or has in another shape, in
    words; ``None``: there is none.
    """
    here = {name: list(weight.shape) for name, weight in weights.items()}
    there = {weight.name: list(weight.shape) for weight in plan.shapes}
    strange = (name for name, shape in there.items() if here.get(name) != shape)
    return next((f"'{n}' is {here.get(n, 'missing')} here, {there[n]} there" for n in strange), None)


def steps_to(plan: PruningPlan, weights: Mapping[str, Tensor]) -> tuple[PruningPlan, ...]:
    """Those of the earlier plans of a chain that a model is still to go through, by the shapes of its
    parameters; all of them where it fits nowhere.
    """
    fits = [strange_weight(step, weights) is None for step in (*plan.earlier, plan)]
    return plan.earlier[fits.index(True) if any(fits) else 0 :]


def check_structure(plan: PruningPlan, weights: Mapping[str, Tensor]) -> list[str]:
    """Refuse a model whose parameters have other names or shapes than those of the model that the plan was
    made for; of a plan that does not say these, also other values.

    Args:
        plan: the plan.
        weights: the model's parameters, by name.

    Returns:
        What there is to say of the plan for this model.

    Raises:
        PlanError: names a weight, or says that the plan was applied to the model already.
    """
    found, strange = fingerprint(weights), strange_weight(plan, weights)
    if not plan.shapes or found == plan.result:
        check_fingerprint(plan, found)
    if plan.shapes and (more := weights.keys() - {each.name for each in plan.shapes}):
        strange = f"'{min(more)}' is not there"
    if strange:
        raise PlanError(f"the plan is for another model: {strange}; make a plan for this model")
    return [] if found == plan.fingerprint else ["the plan was made when the weights had other values"]


def check_fingerprint(plan: PruningPlan, found: str) -> None:
    """Refuse a model that the plan was not made for.

    Args:
        plan: the plan.
        found: the model's fingerprint.

    Raises:
        PlanError: says whether the plan was applied to the model already.
    """
    if found == plan.result != plan.fingerprint:
        raise PlanError("the plan was already applied to this model: it is the plan's own result")
    if found != plan.fingerprint:
        raise PlanError(
            f"the plan is for another model: its fingerprint is {plan.fingerprint[:12]}…, this model's is"
            f" {found[:12]}…; make a plan for this model"
        )


def planned(groups: Iterable[Group], gone: np.ndarray, analysis: Coupling) -> list[PlannedGroup]:
    """One entry per group; ``gone`` says for each channel number whether it is removed."""
    gone_sets = marked(int(analysis.labels.max(initial=-1)) + 1, analysis.labels[gone])
    return [_planned(group, gone, int(gone_sets[group.sets].sum()), analysis) for group in groups]


def _planned(group: Group, gone: np.ndarray, removed: int, analysis: Coupling) -> PlannedGroup:
    lost: dict[tuple[str, int], list[set[int]]] = {}
    for slot in group.slots:
        along = slice(slot.base, slot.base + slot.size)
        places = np.flatnonzero(gone[along] & np.isin(analysis.labels[along], group.sets))
        name, rows = analysis.program.origin(slot.name, slot.dim, slot.size)
        width = slot.size // slot.blocks
        blocks = lost.setdefault((name, slot.dim), [set() for _ in range(slot.blocks)])
        for block, indices in enumerate(blocks):
            indices.update((rows[places[places // width == block]] - block * width).tolist())

    def cut(members: Iterable[Member]) -> tuple[ParameterSlice, ...]:
        return tuple(
            _slice(m.name, m.dim, tuple(tuple(sorted(each)) for each in lost[(m.name, m.dim)]), m.block_dim)
            for m in members
        )

    producers, consumers = cut(group.producers), cut(group.consumers)
    return PlannedGroup(
        group.name, group.size, group.blocks, removed, producers, consumers, group.granularity
    )


def gone_of(plan: PruningPlan, analysis: Coupling, *, partial: bool = False) -> np.ndarray:
    """For every channel number of the analysis, whether the plan removes it.

    Args:
        partial: the program is a part of the plan's model, and weights that it does not use are none of its
            business.

    Raises:
        PlanError: the plan names a weight or index that the model lacks, cuts through a channel set, or takes
            channels that cannot go.
    """
    gone = _named_in(plan, analysis, partial or analysis.brought is not None)
    numbering, labels, brought = analysis.numbering, analysis.labels, analysis.brought or ()
    # A plan names weights; inputs that hold state, tensors that the graph makes, and weights that foreign
    # passes have brought go with them.
    named = [slot.kind == "weight" and slot.name not in brought for slot in numbering.slots]
    weights = np.repeat(np.array(named, dtype=bool), [slot.size for slot in numbering.slots])
    count = int(labels.max(initial=-1)) + 1
    counted, whole = (np.bincount(labels, each, minlength=count) for each in (gone & weights, weights))
    allowed = marked(count, *(group.sets for group in analysis.chosen))
    for wrong, problem in (
        ((counted > 0) & (counted < whole), "cuts through a channel set of {}, of which a part stays"),
        (~allowed & (counted > 0), "removes channels of {}, which cannot be pruned in this model"),
    ):
        if wrong.any():
            slot = numbering.slot_of(int(np.flatnonzero(wrong[labels])[0]))
            raise PlanError(f"the plan {problem.format(slot)}; make the plan again")
    for group in analysis.chosen:
        per_block = [int((counted[group.sets[block]] > 0).sum()) for block in by_block(group.block_of)]
        if len(set(per_block)) > 1 or max(per_block, default=0) > group.deepest_loss:
            least = "one" if group.needed == 1 else str(group.needed)
            raise PlanError(
                f"the plan removes {per_block} channel sets from blocks of group '{group.name}'; each must"
                f" lose the same number and keep {least}"
            )
    return counted[labels] > 0


def _named_in(plan: PruningPlan, analysis: Coupling, partial: bool) -> np.ndarray:
    """For every channel number, whether the plan names it.

    Args:
        partial: weights that the program lacks are none of its business.

    Raises:
        PlanError: the plan names a weight or an index that the program lacks.
    """
    program, numbering = analysis.program, analysis.numbering
    canonical = program.canonical()
    wanted: dict[tuple[str, int], frozenset[tuple[int, int]]] = {}
    for (name, dim), removed in plan.slices().items():
        place = (canonical.get(name, name), dim)
        wanted[place] = wanted.get(place, frozenset()) | removed
    gone = np.zeros(numbering.total, dtype=bool)
    sizes: dict[tuple[str, int], tuple[int, int]] = {}
    for slot in numbering.slots:
        name, rows = program.origin(slot.name, slot.dim, slot.size)
        place, width = (name, slot.dim), slot.size // slot.blocks
        size = width if slot.blocks > 1 else int(rows.max()) + 1
        sizes[place] = slot.blocks, max(sizes.get(place, (0, 0))[1], size)
        indices = [block * width + index for block, index in wanted.get(place, ())]
        gone[slot.base : slot.base + slot.size] |= np.isin(rows, np.array(indices, dtype=np.int64))
    for (name, dim), removed in wanted.items():
        blocks, size = sizes.get((name, dim), (0, 0))
        outside = [index for block, index in removed if not (0 <= index < size and 0 <= block < blocks)]
        if outside and (blocks or not partial):
            raise PlanError(
                f"the plan removes index {max(outside)} along dimension {dim} of '{name}', which the model"
                " does not have; it is a plan for another model"
            )
    for entry in plan.groups if analysis.brought is not None else ():
        if not any((part.name, part.dim) in sizes for part in entry.parts):
            raise PlanError(f"foreign passes have replaced all weights of the plan's group '{entry.name}'")
    return gone
