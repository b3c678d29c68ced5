"""What is removed, as data: readable, replayable, tied to one model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import fx, nn

from fasp_fx.base import Count, from_document, to_document
from fasp_fx.base import fingerprint as fingerprint
from fasp_fx.capturing import FoldedWeight, Program, SplitWeight, attribute
from fasp_fx.errors import ArgumentError, PlanError

from ._groups import Group, Member, by_block, ranges

if TYPE_CHECKING:
    from ._analysis import Analysis


@dataclass(frozen=True)
class ParameterSlice:
    """The indices removed along one dimension of one weight; ``name`` is that of
    ``model.named_parameters()``.

    With ``block_dim`` there is one tuple of indices for each of the equal blocks into which that dimension is
    divided: an expert each of a stacked weight, a group each of a grouped convolution.

    Examples:
        >>> removed = result.plan.groups[0].consumers[0]
        >>> print(removed.name, removed.dim, len(removed.removed))
        2.weight 1 10
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
        2.weight 10 of 32
    """

    name: str
    size: Count
    blocks: Count
    removed_sets: Count
    producers: tuple[ParameterSlice, ...]
    consumers: tuple[ParameterSlice, ...]
    granularity: str = "channel"

    def __str__(self) -> str:
        left, right = ", ".join(map(str, self.producers)), ", ".join(map(str, self.consumers))
        return f"{self.name}: {self.removed_sets} of {self.size}  {left} -> {right}"


@dataclass(frozen=True)
class FixedBuffer:
    """A buffer or constant that the model reads and does not write into, and the digest of what it held."""

    name: str
    digest: str


@dataclass(frozen=True)
class PruningPlan:
    """Which channels go.

    Attributes:
        fingerprint: of the model the plan was made for.
        groups: what each coupled group loses; groups that lose nothing are left out.
        sparsity: the fraction removed of the counted weights.
        splits: fused weights that the result holds in parts.
        result: fingerprint of the model the plan makes, known once it was applied.
        granularity, include: as given to :func:`fasp_fx.prune`.
        folds: weights that the model computes from others, and that the result holds as parameters; the
            groups name them so.
        fixed: what else the model read and did not write into when the plan was made. The plan serves also
            where it holds something else; the repairs of the result do not.

    Examples:
        >>> plan = fasp_fx.PruningPlan.from_json(result.plan.to_json())
        >>> [(group.name, group.removed_sets) for group in plan.groups]
        [('2.weight', 10)]
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
        found: dict[tuple[str, int], frozenset[tuple[int, int]]] = {}
        for group in self.groups:
            for part in (*group.producers, *group.consumers):
                pairs = frozenset(
                    (block, index) for block, indices in enumerate(part.by_block()) for index in indices
                )
                found[(part.name, part.dim)] = found.get((part.name, part.dim), frozenset()) | pairs
        return found

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
        gone = earlier.slices()
        experts = {
            (part.name, part.dim): set(part.by_block()[0])
            for group in earlier.groups
            if group.granularity == "expert"
            for part in (*group.producers, *group.consumers)
        }

        def renumber(part: ParameterSlice) -> list[ParameterSlice]:
            before = gone.get((part.name, part.dim), frozenset())
            pieces = [split for split in earlier.splits if split.source == part.name]
            blocks = tuple(
                _renumber(indices, (index for block, index in before if block == own))
                for own, indices in enumerate(part.by_block())
            )
            if part.block_dim is not None:  # one block for each expert, some of which are gone
                lost = experts.get((part.name, part.block_dim), set())
                blocks = tuple(block for own, block in enumerate(blocks) if own not in lost)
            if not pieces:
                return [_slice(part.name, part.dim, blocks, part.block_dim)]
            if pieces[0].dim != part.dim:
                return [_slice(piece.name, part.dim, blocks, part.block_dim) for piece in pieces]
            by_rows = []
            for piece in pieces:
                at = {row: index for index, row in enumerate(piece.rows)}
                own, gone_there = (
                    [at[row] for row in rows if row in at]
                    for rows in (part.by_block()[0], [row for _, row in before])
                )
                if own:
                    by_rows.append(ParameterSlice(piece.name, part.dim, _renumber(own, gone_there)))
            return by_rows

        # Of another granularity the channel sets are others, whose number nobody has counted.
        sizes = {(group.name, group.granularity): group.removed_sets for group in earlier.groups}
        groups = []
        for group in self.groups:
            parts = (group.producers, group.consumers)
            producers, consumers = (tuple(new for part in side for new in renumber(part)) for side in parts)
            left = sum(part.count for part in producers + consumers)
            if left:
                before = sum(part.count for part in group.producers + group.consumers)
                size = group.size - sizes.get((group.name, group.granularity), 0)
                removed = max(round(group.removed_sets * left / before), 1)
                new = replace(group, size=size, removed_sets=removed)
                groups.append(replace(new, producers=producers, consumers=consumers))
        now, then = (sum(group.removed_sets for group in some) for some in (groups, self.groups))
        return PruningPlan(
            earlier.result,
            tuple(groups),
            self.sparsity * now / max(then, 1),
            granularity=self.granularity,
            include=self.include,
        )


def _renumber(removed: Iterable[int], before: Iterable[int]) -> tuple[int, ...]:
    """``removed`` without ``before``, counted in what ``before`` leaves."""
    gone = np.array(sorted(before), dtype=np.int64)
    left = np.setdiff1d(np.fromiter(removed, dtype=np.int64), gone)
    return tuple((left - np.searchsorted(gone, left)).tolist())


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
    digest = hashlib.sha256(computed_fingerprint(program).encode())
    for name, module in program.module.named_modules():
        if isinstance(module, fx.GraphModule):
            code = re.sub(r"device\(type=.*?\)|cuda:\d+", "device", module.code)  # ranks have others
            digest.update(f"{name} {code}".encode())
    return digest.hexdigest()


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
    held = dict(dense.named_buffers(remove_duplicate=False))
    saved = dense.state_dict(keep_vars=True)
    for buffer in plan.fixed:
        name = buffer.name
        # What is not saved (a table that grows with the longest call so far) follows from what is.
        if name in held and name in saved and fingerprint({"": held[name]}) != buffer.digest:
            raise ArgumentError(
                f"dense is not the model that was pruned: its buffer '{name}' holds other values than it did"
                " then; pass the model as it was given to prune"
            )


def check_fingerprint(plan: PruningPlan, found: str) -> None:
    """Refuse a model that the plan was not made for.

    Args:
        plan: the plan.
        found: the model's fingerprint.

    Raises:
        PlanError: says whether the plan was applied to the model already.
    """
    if found != plan.fingerprint:
        own = found == plan.result
        raise PlanError(
            "the plan was already applied to this model: it is the plan's own result"
            if own
            else (
                f"the plan is for another model: its fingerprint is {plan.fingerprint[:12]}…, this model's is"
                f" {found[:12]}…; make a plan for this model"
            )
        )


def planned(groups: Iterable[Group], gone: np.ndarray, analysis: Analysis) -> list[PlannedGroup]:
    """One entry per group; ``gone`` says for each channel number whether it is removed."""
    gone_sets = np.zeros(int(analysis.labels.max(initial=-1)) + 1, dtype=bool)
    gone_sets[analysis.labels[gone]] = True
    return [_planned(group, gone, int(gone_sets[group.sets].sum()), analysis) for group in groups]


def _planned(group: Group, gone: np.ndarray, removed: int, analysis: Analysis) -> PlannedGroup:
    lost: dict[tuple[str, int], list[list[int]]] = {}
    for slot in group.slots:
        own = np.flatnonzero(
            gone[slot.base : slot.base + slot.size]
            & np.isin(analysis.labels[slot.base : slot.base + slot.size], group.sets)
        )
        name, rows = analysis.program.origin(slot.name, slot.dim, slot.size)
        blocks = lost.setdefault((name, slot.dim), [[] for _ in range(slot.blocks)])
        for block, indices in enumerate(blocks):
            width = slot.size // slot.blocks
            indices.extend(
                (rows[own[own // width == block]] - block * width if slot.blocks > 1 else rows[own]).tolist()
            )

    def cut(members: Iterable[Member]) -> tuple[ParameterSlice, ...]:
        return tuple(
            _slice(
                m.name,
                m.dim,
                tuple(tuple(sorted(set(block))) for block in lost[(m.name, m.dim)]),
                m.block_dim,
            )
            for m in members
        )

    return PlannedGroup(
        group.name,
        group.size,
        group.blocks,
        removed,
        cut(group.producers),
        cut(group.consumers),
        group.granularity,
    )


def gone_of(plan: PruningPlan, analysis: Analysis, *, partial: bool = False) -> np.ndarray:
    """For every channel number of the analysis, whether the plan removes it.

    Args:
        partial: the program is a part of the plan's model, and weights that it does not use are none of its
            business.

    Raises:
        PlanError: the plan names a weight or index that the model lacks, cuts through a channel set, or takes
            channels that cannot go.
    """
    program, numbering = analysis.program, analysis.numbering
    canonical = program.canonical()
    wanted: dict[tuple[str, int], frozenset[tuple[int, int]]] = {}
    for (name, dim), removed in plan.slices().items():
        place = (canonical.get(name, name), dim)
        wanted[place] = wanted.get(place, frozenset()) | removed
    labels, brought = analysis.labels, analysis.brought
    gone = np.zeros(numbering.total, dtype=bool)
    known: dict[tuple[str, int], tuple[int, int]] = {}
    for slot in numbering.slots:
        name, rows = program.origin(slot.name, slot.dim, slot.size)
        width = slot.size // slot.blocks
        known[(name, slot.dim)] = (
            slot.blocks,
            max(known.get((name, slot.dim), (0, 0))[1], width if slot.blocks > 1 else int(rows.max()) + 1),
        )
        taken = wanted.get((name, slot.dim))
        if taken:
            gone[slot.base : slot.base + slot.size] |= np.isin(
                rows, np.array([block * width + index for block, index in taken], dtype=np.int64)
            )
    for (name, dim), removed in wanted.items():
        blocks, size = known.get((name, dim), (0, 0))
        if (partial or brought is not None) and not blocks:
            continue
        outside = [index for block, index in removed if not (0 <= index < size and 0 <= block < blocks)]
        if outside:
            raise PlanError(
                f"the plan removes index {max(outside)} along dimension {dim} of '{name}', which the model"
                " does not have; it is a plan for another model"
            )
    for entry in plan.groups if brought is not None else ():
        if not any((part.name, part.dim) in known for part in (*entry.producers, *entry.consumers)):
            raise PlanError(f"foreign passes have replaced all weights of the plan's group '{entry.name}'")
    # A plan names weights; inputs that hold state, tensors that the graph makes, and weights that foreign
    # passes have brought go with them.
    weights = np.zeros(numbering.total, dtype=bool)
    for slot in numbering.slots:
        is_named = slot.kind == "weight" and slot.name not in (brought or ())
        weights[slot.base : slot.base + slot.size] = is_named
    counted = np.bincount(labels, weights=gone & weights, minlength=int(labels.max(initial=-1)) + 1)
    whole = np.bincount(labels, weights=weights, minlength=len(counted))
    allowed = np.zeros(len(counted), dtype=bool)
    for group in analysis.chosen:
        allowed[group.sets] = True
    for wrong, says in (
        ((counted > 0) & (counted < whole), "cuts through a channel set of {}, of which a part stays"),
        (~allowed & (counted > 0), "removes channels of {}, which cannot be pruned in this model"),
    ):
        if wrong.any():
            slot = numbering.slot_of(int(np.flatnonzero(wrong[labels])[0]))
            raise PlanError(f"the plan {says.format(slot)}; make the plan again")
    for group in analysis.chosen:
        per_block = [int((counted[group.sets[block]] > 0).sum()) for block in by_block(group.block_of)]
        if len(set(per_block)) > 1 or (any(per_block) and group.width - per_block[0] < group.needed):
            least = "one" if group.needed == 1 else str(group.needed)
            raise PlanError(
                f"the plan removes {per_block} channel sets from blocks of group '{group.name}'; each must"
                f" lose the same number and keep {least}"
            )
    return counted[labels] > 0
