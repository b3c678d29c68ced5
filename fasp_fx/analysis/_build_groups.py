"""Build the groups of an analysis: what is known of each channel set, which sets make a group, and which of
them must be removed in equal numbers; their weights, blocks and granularity, and what freezes them after all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from torch import fx

from fasp_fx.capturing import Program, attribute
from fasp_fx.patterns import find_composites

from ._groups import APPROXIMATE, EXEMPT, FROZEN, PRUNABLE, Conflict, Group, Member
from .channels import Numbering, Remark, Slot, Use, Walk, marked

LAYOUT = "layout"
CODE = {PRUNABLE: 0, APPROXIMATE: 1, FROZEN: 2, EXEMPT: 3}
STATUS = {code: name for name, code in CODE.items()}

#: of each group, the slots and the uses that hold its channel sets
Keys = dict[int, tuple[frozenset[int], frozenset[int]]]


@dataclass(frozen=True)
class ChannelSets:
    """What is known of each channel set.

    Attributes:
        labels: the channel set of each channel number.
        expert: how many of its like a router needs at once if a set is an expert, else 0 (see
            :func:`needed_experts`).
        exempt: whether exempt sets are to be pruned as well.
        status, reason: a code of :data:`CODE` and why, for each set.
        stuck: whether a set is frozen for want of a layout that can lose it.
    """

    labels: np.ndarray
    expert: np.ndarray
    exempt: bool
    status: np.ndarray
    reason: np.ndarray
    stuck: np.ndarray

    @staticmethod
    def of(labels: np.ndarray, expert: np.ndarray, exempt: bool, walk: Walk, program: Program) -> ChannelSets:
        """Judge each channel set by the remarks of an interpretation."""
        stuck = np.zeros(len(expert), dtype=bool)
        return ChannelSets(labels, expert, exempt, *_status(labels, expert, exempt, walk, program), stuck)

    @property
    def count(self) -> int:
        return len(self.status)

    def freeze(self, sets: np.ndarray, reason: str) -> None:
        """Freeze some sets for want of a layout that can lose them."""
        self.status[sets], self.stuck[sets] = CODE[FROZEN], True
        self.reason[sets] = f"{LAYOUT}: {reason}"


def _status(
    labels: np.ndarray, expert: np.ndarray, exempt: bool, walk: Walk, program: Program
) -> tuple[np.ndarray, np.ndarray]:
    """A status code and a reason for each channel set; an exemption outweighs freezing (unless what is exempt
    is to be pruned), freezing outweighs mixing.

    What a router does to experts, and sums in which those that it never chooses are zero, leaves those that
    stay as they are; positions of windows are frozen where they are something else as well: those of a kernel
    that is computed, or of a weight that is read in another way elsewhere.
    """
    composites = find_composites(program.module.graph)
    status = np.full(len(expert), CODE[PRUNABLE], dtype=np.int8)
    reason = np.full(len(expert), "", dtype=object)

    facts = walk.facts
    columns, multiplied = [use.columns for use in facts.uses], [product.numbers for product in facts.products]
    elsewhere = [*(numbers for numbers, _ in facts.produced), *columns, *multiplied]
    something_else = marked(len(expert), *(labels[numbers[numbers >= 0]] for numbers in elsewhere))

    def mark(remarks: list[Remark], code: str, among: np.ndarray | None = None) -> None:
        for remark in reversed(remarks):  # the first remark in graph order is the one shown
            sets = labels[remark.numbers]
            sets = sets[expert[sets] == 0] if remark.routing else sets
            sets = sets if among is None else sets[among[sets]]
            status[sets] = CODE[code]
            inside = composites.get(remark.node) if remark.node is not None else None
            reason[sets] = f"{remark.reason} of {inside}" if inside else remark.reason

    if exempt:
        mark(facts.exempt, EXEMPT)
    mark(facts.mixed, APPROXIMATE)
    mark(facts.inside, FROZEN, something_else)
    mark(facts.frozen, FROZEN)
    if not exempt:
        mark(facts.exempt, EXEMPT)
    return status, reason


def group_sets(found: ChannelSets, numbering: Numbering, walk: Walk) -> tuple[np.ndarray, Keys]:
    """The group of each channel set: those with the same status, slots and uses; and per group its slots and
    uses.
    """
    labels = found.labels
    group_of = found.status.astype(np.int64) * 2 + found.stuck
    offset = len(numbering.slots)
    items = [np.unique(labels[slot.base : slot.base + slot.size]) for slot in numbering.slots]
    for use in walk.facts.uses:
        items.append(np.unique(labels[use.columns[use.columns >= 0]]))
    fresh = int(group_of.max(initial=-1)) + 1
    # Partition refinement: two sets stay together as long as every item holds both or neither.
    for sets in items:
        _, finer = np.unique(group_of[sets], return_inverse=True)
        group_of[sets] = fresh + finer
        fresh += int(finer.max(initial=-1)) + 1
    _, first, group_of = np.unique(group_of, return_index=True, return_inverse=True)
    places = np.repeat(np.arange(len(items)), [len(sets) for sets in items])
    holds = (np.ones(len(places)), (np.concatenate([np.zeros(0, dtype=np.int64), *items]), places))
    held = coo_matrix(holds, shape=(found.count, len(items))).tocsr()[first]
    keys = {
        index: (frozenset(by[by < offset].tolist()), frozenset((by[by >= offset] - offset).tolist()))
        for index, by in enumerate(np.split(held.indices, held.indptr[1:-1]))
    }
    return group_of, keys


# --- Blocks: a tensor ``[heads, d]`` may lose different channels in each row but the same number in each.
# From all such tensors (*boxes*) the blocks of every group follow, and the boxes that no blocks can keep.


def find_blocks(
    boxes: Iterable[tuple[np.ndarray, fx.Node]], labels: np.ndarray, group_of: np.ndarray
) -> tuple[np.ndarray, list[Conflict]]:
    """Refine each group into blocks and check every box.

    Args:
        boxes: number tensors ``[rows, length]`` that shrink along their length.
        labels: the channel set of each channel number.
        group_of: the group of each channel set; negative for those that are never removed.

    Returns:
        The block of each channel set, unique over all groups, and the boxes that cannot stay one.
    """
    block = group_of.astype(np.int64) - int(group_of.min(initial=0))
    fresh = int(block.max(initial=0)) + 1
    tables = []
    for numbers, node in boxes:
        sets = np.where(numbers >= 0, labels[np.maximum(numbers, 0)], -1)
        candidate = (sets >= 0) & (group_of[np.maximum(sets, 0)] >= 0)
        if not candidate.any():
            continue
        rows, columns = np.nonzero(candidate)
        tables.append((rows, sets[rows, columns], node))
        members, first = np.unique(sets[rows, columns], return_index=True)
        first_row = rows[first]
        _, finer = np.unique(block[members] * numbers.shape[0] + first_row, return_inverse=True)
        # Sets outside this box keep their block, which is thereby told apart from those inside.
        block[members] = fresh + finer
        fresh += int(finer.max()) + 1
    _, block = np.unique(block, return_inverse=True)
    sizes = np.bincount(block[group_of >= 0], minlength=int(block.max(initial=0)) + 1)
    conflicts = []
    for rows, sets, node in tables:
        bad = _uneven(rows, sets, block, sizes, group_of)
        if bad.size:
            conflicts.append(Conflict(node, bad))
    return block, conflicts


def torn_blocks(numbering: Numbering, labels: np.ndarray) -> Iterator[tuple[Slot, np.ndarray]]:
    """The channel sets that take all channels of a block of a weight, but not the block's part of the
    dimension that is divided into blocks.
    """
    for slot in numbering.slots:
        divider = None if slot.block_dim is None else numbering.get(slot.name, slot.block_dim)
        if divider is None:
            continue
        rows, parts = (
            labels[own.base : own.base + own.size].reshape(slot.blocks, -1) for own in (slot, divider)
        )
        first = rows[:, :1]
        torn = first[(rows == first).all(1) & (parts != first).any(1)]
        if torn.size:
            yield slot, np.unique(torn)


def _uneven(
    rows: np.ndarray, sets: np.ndarray, block: np.ndarray, sizes: np.ndarray, group_of: np.ndarray
) -> np.ndarray:
    """The channel sets of a box that equal counts per block do not keep equal in every row."""
    held, column = np.unique(sets, return_inverse=True)
    blocks, first, own = np.unique(block[held], return_index=True, return_inverse=True)
    size = sizes[blocks]
    times = coo_matrix((np.ones(len(rows)), (rows, column))).tocsr()
    members = coo_matrix((np.ones(len(held)), (np.arange(len(held)), own))).tocsr()
    totals, squares = (times @ members).toarray(), (times.multiply(times) @ members).toarray()
    # All of a block must lie in a row equally often: of numbers whose mean has their mean square.
    broken = (squares * size != totals**2).any(0)
    # Blocks of one group and one size lose equal counts; each row must hold the same number of them, with
    # multiplicity.
    _, kind = np.unique(np.stack([group_of[held[first]], size]), axis=1, return_inverse=True)
    kind = kind.reshape(-1)
    per_kind = totals @ coo_matrix((~broken / size, (np.arange(len(blocks)), kind))).tocsr()
    uneven = ~np.isclose(per_kind, per_kind[:1]).all(0)
    return held[(broken | uneven[kind])[own]]


class GroupBuilder:
    """Builds groups of one interpretation.

    Args:
        found: what is known of each channel set.
        block: the block of each channel set within its layout.
        numbering, walk, program: what was interpreted, and how.
    """

    def __init__(
        self, found: ChannelSets, block: np.ndarray, numbering: Numbering, walk: Walk, program: Program
    ) -> None:
        self.found, self.block, self.numbering, self.walk, self.program = (
            found,
            block,
            numbering,
            walk,
            program,
        )
        self.known_as = program.known_as()
        labels, facts = found.labels, walk.facts
        index_of = {(slot.name, slot.dim): index for index, slot in enumerate(numbering.slots)}
        self.produces = {index_of[slot] for _, slot in facts.produced if slot in index_of}
        for numbers in (numbers for numbers, slot in facts.produced if slot is None):
            self.produces |= set(numbering.slot_ids(numbers[numbers >= 0]).tolist())
        self.consumes = {index_of[slot] for use in facts.uses for slot in use.slots}
        self.positions = {node: index for index, node in enumerate(program.module.graph.nodes)}
        multiplied = facts.products if found.exempt else []
        self.headed, self.multiplied = (
            marked(found.count, *(labels[own] for own in numbers))
            for numbers in ([own for _, own, _ in facts.heads], [product.numbers for product in multiplied])
        )
        self.multiples = np.ones(found.count, dtype=np.int64)
        for numbers, multiple in facts.aligned:
            own = labels[numbers[numbers >= 0]]
            self.multiples[own] = np.lcm(self.multiples[own], multiple)
        self.parameters = {
            program.parts[name].source if name in program.parts else name
            for name, _ in program.module.named_parameters(remove_duplicate=False)
        }

    def groups(self, group_of: np.ndarray, keys: Keys) -> list[Group]:
        """All groups, named, in graph order.

        Args:
            group_of, keys: of :func:`group_sets`.
        """
        order = np.argsort(group_of, kind="stable")
        bounds = np.searchsorted(group_of[order], np.arange(len(keys) + 1))
        found: list[tuple[Any, Group]] = []
        for index, (slot_ids, use_ids) in keys.items():
            for sets in self._of_one_size(order[bounds[index] : bounds[index + 1]]):
                found += self._group(sets, sorted(slot_ids), sorted(use_ids))
        return _named([group for _, group in sorted(found, key=lambda item: item[0])])

    def _of_one_size(self, members: np.ndarray) -> Iterator[np.ndarray]:
        """Blocks of unequal size are groups of their own."""
        _, inverse = np.unique(self.block[members], return_inverse=True)
        sizes = np.bincount(inverse)
        for size in np.unique(sizes):
            yield members[sizes[inverse] == size]

    def _group(self, sets: np.ndarray, slot_ids: list[int], use_ids: list[int]) -> list[tuple[Any, Group]]:
        """The group of some channel sets and its place in graph order, or nothing if there is nothing to say
        of it.
        """
        found = self.found
        slots = tuple(self.numbering.slots[i] for i in slot_ids)
        along = [np.isin(found.labels[slot.base : slot.base + slot.size], sets) for slot in slots]
        numbers = [slot.base + np.flatnonzero(own) for slot, own in zip(slots, along, strict=True)]
        uses = tuple(self.walk.facts.uses[i] for i in use_ids)
        experts = bool(found.expert[sets].all())
        if experts:
            uses = (*uses, *self._last_product(sets))
        held = [item for item in zip(slot_ids, slots, numbers, strict=True) if item[1].kind == "weight"]
        taking = {use.weight for use in uses}
        if experts:
            rows = [item for item in held if item[1].name not in taking]
            columns = [item for item in held if item[1].name in taking]
        else:
            rows = [item for item in held if item[0] in self.produces or item[0] not in self.consumes]
            columns = [item for item in held if item[0] in self.consumes]
        producers, consumers = self._members(rows, sets), self._members(columns, sets)
        blocks = len(np.unique(self.block[sets]))
        size = len(sets) // blocks
        code, why = STATUS[int(found.status[sets[0]])], str(found.reason[sets[0]])
        if not uses and code in (PRUNABLE, APPROXIMATE) and not self.multiplied[sets].all():
            if not any(i in self.produces for i in slot_ids):
                return []  # a dimension that nothing in the graph speaks of
            lost = f"{why}, and no weight consumes what is left of them"
            code, why = FROZEN, lost if code == APPROXIMATE else "no weight consumes these channels"
        if size == 1 and (code in (PRUNABLE, APPROXIMATE) or (found.exempt and code == EXEMPT)):
            code, why = FROZEN, f"{LAYOUT}: one channel set takes the whole of a dimension"
        if not any(member.name in self.parameters for member in (*producers, *consumers)):
            return []  # positions of buffers alone
        if code == FROZEN:
            blocks = 1  # frozen channels need no layout: they are shown as one block
        granularity = "expert" if experts else "head" if self.headed[sets].all() else "channel"
        needed = int(found.expert[sets].max()) if experts else 1
        if code == PRUNABLE and size <= needed:
            code, why = FROZEN, f"each token is sent to {needed} of them"
        group = Group(
            "",
            len(sets),
            blocks,
            code,
            why,
            tuple(producers),
            tuple(consumers),
            sets,
            self.block[sets],
            granularity,
            needed,
            uses,
            slots,
            multiple=int(np.lcm.reduce(self.multiples[sets])),
        )
        at = min((self.positions[use.node] for use in uses), default=len(self.positions))
        return [((at, min(int(own.min()) for own in numbers)), group)]

    def _last_product(self, sets: np.ndarray) -> list[Use]:
        """The last use of a stacked weight, one block an expert: what it gives is what an expert gives."""
        uses = [
            use
            for use in self.walk.facts.uses
            if use.block_numbers is not None and np.isin(self.found.labels[use.block_numbers], sets).any()
        ]
        return sorted(uses, key=lambda use: self.positions[use.node])[-1:]

    def _members(self, held: list[tuple[int, Slot, np.ndarray]], sets: np.ndarray) -> list[Member]:
        """One member per weight of the caller's; the parts of a split one are shown together."""
        order = np.argsort(sets)
        ordered = sets[order]
        found: dict[tuple[str, int], list[tuple[Slot, np.ndarray, np.ndarray]]] = {}
        for _, slot, numbers in held:
            name, rows = self.program.origin(slot.name, slot.dim, slot.size)
            positions = order[np.searchsorted(ordered, self.found.labels[numbers])]
            found.setdefault((name, slot.dim), []).append((slot, rows[numbers - slot.base], positions))
        return [
            _member(name, self.program, tuple(o for o in self.known_as.get(name, ()) if o != name), pieces)
            for (name, _), pieces in found.items()
        ]


def _named(groups: list[Group]) -> list[Group]:
    taken: Counter[str] = Counter()
    named = []
    for group in groups:
        base = (group.consumers or group.producers)[0].name
        taken[base] += 1
        named.append(replace(group, name=base if taken[base] == 1 else f"{base}#{taken[base]}"))
    return named


def _member(
    name: str, program: Program, aliases: tuple[str, ...], pieces: list[tuple[Slot, np.ndarray, np.ndarray]]
) -> Member:
    """The member that all pieces of a weight make up; columns are those of every piece."""
    slot = pieces[-1][0]
    indices, positions = (np.concatenate([piece[side] for piece in pieces[::-1]]) for side in (1, 2))
    indices, first = np.unique(indices, return_index=True)
    size = _size_before_split(program, slot, name) if slot.name in program.parts else slot.size
    return Member(
        name,
        slot.dim,
        tuple(indices.tolist()),
        size,
        slot.block_dim,
        slot.blocks,
        tuple(positions[first].tolist()),
        aliases,
    )


def _size_before_split(program: Program, slot: Slot, original: str) -> int:
    parts = [part for part in program.parts.values() if part.source == original]
    return (
        sum(len(part.rows) for part in parts)
        if slot.dim == parts[0].dim
        else int(attribute(program.module, slot.name).shape[slot.dim])
    )


def needed_experts(labels: np.ndarray, count: int, walk: Walk) -> np.ndarray:
    """For each channel set that is an expert, how many a router needs at once; 0 for the others.

    An expert competes with its like in a softmax or top-k, and takes a whole matrix out of a stacked weight.
    """
    stacked = np.zeros(count, dtype=bool)
    for numbers in walk.facts.stacked:
        stacked[labels[numbers[numbers >= 0]]] = True
    needed = np.zeros(count, dtype=np.int64)
    for numbers, times in walk.facts.chosen:
        sets = np.unique(labels[numbers[numbers >= 0]])
        needed[sets] = np.maximum(needed[sets], times)
    return np.where(stacked, needed, 0)
