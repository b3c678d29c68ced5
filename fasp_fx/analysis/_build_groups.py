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

from fasp_fx.capturing import Program
from fasp_fx.patterns import find_composites

from ._groups import APPROXIMATE, EXEMPT, FROZEN, PRUNABLE, Conflict, Group, Member
from .channels import Numbering, Remark, Slot, Use, Walk, marked

LAYOUT = "layout"
CODE = {PRUNABLE: 0, APPROXIMATE: 1, FROZEN: 2, EXEMPT: 3}
STATUS = {code: name for name, code in CODE.items()}
FREE = (CODE[PRUNABLE], CODE[APPROXIMATE])

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
        """Judge each channel set by the remarks of an interpretation: an exemption outweighs freezing (unless
        what is exempt is to be pruned), freezing outweighs mixing.

        What a router does to experts, and sums in which those that it never chooses are zero, leaves those
        that stay as they are; positions of windows are frozen where they are something else as well: those of
        a kernel that is computed, or of a weight that is read in another way elsewhere.
        """
        composites, facts = find_composites(program.module.graph), walk.facts
        status = np.full(len(expert), CODE[PRUNABLE], dtype=np.int8)
        reason = np.full(len(expert), "", dtype=object)

        def mark(remarks: list[Remark], code: str, among: np.ndarray | None = None) -> None:
            for remark in reversed(remarks):  # the first remark in graph order is the one shown
                sets = labels[remark.numbers]
                sets = sets[expert[sets] == 0] if remark.routing else sets
                sets = sets if among is None else sets[among[sets]]
                inside = composites.get(remark.node) if remark.node is not None else None
                reason[sets] = f"{remark.reason} of {inside}" if inside else remark.reason
                status[sets] = CODE[code]

        elsewhere = [numbers for numbers, _ in facts.produced]
        elsewhere += [use.columns for use in facts.uses] + [product.numbers for product in facts.products]
        something_else = marked(len(expert), *(labels[numbers[numbers >= 0]] for numbers in elsewhere))
        mark(facts.remarks.exempt if exempt else [], EXEMPT)
        mark(facts.remarks.mixed, APPROXIMATE)
        mark(facts.remarks.inside, FROZEN, something_else)
        mark(facts.remarks.frozen, FROZEN)
        mark([] if exempt else facts.remarks.exempt, EXEMPT)
        return ChannelSets(labels, expert, exempt, status, reason, np.zeros(len(expert), dtype=bool))

    def freeze(self, sets: np.ndarray, reason: str) -> None:
        """Freeze some sets for want of a layout that can lose them; what is exempt and not to be pruned says
        more than its layout.
        """
        sets = sets[~self.spared[sets]]
        self.status[sets], self.stuck[sets] = CODE[FROZEN], True
        self.reason[sets] = f"{LAYOUT}: {reason}"

    @property
    def spared(self) -> np.ndarray:
        """Whether each set is exempt and not to be pruned."""
        return (self.status == CODE[EXEMPT]) & (not self.exempt)


def group_sets(judged: ChannelSets, numbering: Numbering, walk: Walk) -> tuple[np.ndarray, Keys]:
    """The group of each channel set: those with the same status, slots and uses; and per group its slots and
    uses.
    """
    labels = judged.labels
    group_of = judged.status.astype(np.int64) * 2 + judged.stuck
    items = [np.unique(labels[slot.base : slot.base + slot.size]) for slot in numbering.slots]
    items += [np.unique(labels[use.columns[use.columns >= 0]]) for use in walk.facts.uses]
    fresh = int(group_of.max(initial=-1)) + 1
    # Partition refinement: two sets stay together as long as every item holds both or neither.
    for sets in items:
        _, finer = np.unique(group_of[sets], return_inverse=True)
        group_of[sets] = fresh + finer
        fresh += int(finer.max(initial=-1)) + 1
    _, first, group_of = np.unique(group_of, return_index=True, return_inverse=True)
    places = np.repeat(np.arange(len(items)), [len(sets) for sets in items])
    sets, shape = np.concatenate([np.zeros(0, dtype=np.int64), *items]), (len(judged.status), len(items))
    members = coo_matrix((np.ones(len(places)), (sets, places)), shape=shape).tocsr()[first]
    offset = len(numbering.slots)
    keys = {
        index: (frozenset(by[by < offset].tolist()), frozenset((by[by >= offset] - offset).tolist()))
        for index, by in enumerate(np.split(members.indices, members.indptr[1:-1]))
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
        count, (rows, columns) = len(numbers), np.nonzero(candidate)
        tables.append((count, rows, sets[rows, columns], node))
        members, first = np.unique(sets[rows, columns], return_index=True)
        _, finer = np.unique(block[members] * count + rows[first], return_inverse=True)
        # Sets outside this box keep their block, which is thereby told apart from those inside.
        block[members] = fresh + finer
        fresh += int(finer.max()) + 1
    _, block = np.unique(block, return_inverse=True)
    sizes = np.bincount(block[group_of >= 0], minlength=int(block.max(initial=0)) + 1)
    conflicts = [
        Conflict(node, _uneven(count, rows, sets, block, sizes, group_of))
        for count, rows, sets, node in tables
    ]
    return block, [conflict for conflict in conflicts if conflict.classes.size]


def torn_blocks(numbering: Numbering, labels: np.ndarray) -> Iterator[tuple[Slot, np.ndarray]]:
    """The channel sets that take all channels of a block of a weight, but not the block's part of the
    dimension that is divided into blocks.
    """
    for slot in numbering.slots:
        divider = None if slot.block_dim is None else numbering.get(slot.name, slot.block_dim)
        if divider is not None:
            rows, parts = (
                labels[each.base : each.base + each.size].reshape(slot.blocks, -1) for each in (slot, divider)
            )
            first = rows[:, :1]
            yield slot, np.unique(first[(rows == first).all(1) & (parts != first).any(1)])


def _uneven(
    count: int, rows: np.ndarray, sets: np.ndarray, block: np.ndarray, sizes: np.ndarray, group_of: np.ndarray
) -> np.ndarray:
    """The channel sets of a box that equal counts per block do not keep equal in every row, those of so many
    included that have none.
    """
    distinct, column = np.unique(sets, return_inverse=True)
    blocks, first, place = np.unique(block[distinct], return_index=True, return_inverse=True)
    size = sizes[blocks]
    times = coo_matrix((np.ones(len(rows)), (rows, column)), (count, len(distinct))).tocsr()
    members = coo_matrix((np.ones(len(distinct)), (np.arange(len(distinct)), place))).tocsr()
    totals, squares = (times @ members).toarray(), (times.multiply(times) @ members).toarray()
    # All of a block must lie in a row equally often: of numbers whose mean has their mean square.
    broken = (squares * size != totals**2).any(0)
    # Blocks of one group and one size lose equal counts; each row must hold the same number of them, with
    # multiplicity.
    _, kind = np.unique(np.stack([group_of[distinct[first]], size]), axis=1, return_inverse=True)
    per_kind = totals @ coo_matrix((~broken / size, (np.arange(len(blocks)), kind.reshape(-1)))).tocsr()
    uneven = ~np.isclose(per_kind, per_kind[:1]).all(0)
    return distinct[(broken | uneven[kind.reshape(-1)])[place]]


class GroupBuilder:
    """Builds groups of one interpretation.

    Args:
        judged: what is known of each channel set.
        block: the block of each channel set within its layout.
        numbering, walk, program: what was interpreted, and how.
    """

    def __init__(
        self, judged: ChannelSets, block: np.ndarray, numbering: Numbering, walk: Walk, program: Program
    ) -> None:
        self.judged, self.block, self.numbering, self.program = judged, block, numbering, program
        self.uses, labels, facts, count = walk.facts.uses, judged.labels, walk.facts, len(judged.status)
        self.names = program.known_as()
        index_of = {(slot.name, slot.dim): index for index, slot in enumerate(numbering.slots)}
        self.produces = {index_of[slot] for _, slot in facts.produced if slot in index_of}
        somewhere = [numbers[numbers >= 0] for numbers, slot in facts.produced if slot is None]
        self.produces.update(*(numbering.slot_ids(numbers).tolist() for numbers in somewhere))
        self.consumes = {index_of[slot] for use in facts.uses for slot in use.slots}
        self.positions = {node: index for index, node in enumerate(program.module.graph.nodes)}
        products = facts.products if judged.exempt else []
        self.multiplied = marked(count, *(labels[product.numbers] for product in products))
        self.headed = marked(count, *(labels[numbers] for _, numbers, _ in facts.wishes.heads))
        self.multiples = np.ones(count, dtype=np.int64)
        for numbers, multiple in facts.counts.aligned:
            sets = labels[numbers[numbers >= 0]]
            self.multiples[sets] = np.lcm(self.multiples[sets], multiple)
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
        placed: list[tuple[Any, Group]] = []
        for index, (slot_ids, use_ids) in keys.items():
            members = order[bounds[index] : bounds[index + 1]]
            # Blocks of unequal size are groups of their own.
            _, block, sizes = np.unique(self.block[members], return_inverse=True, return_counts=True)
            for size in np.unique(sizes):
                placed += self._group(members[sizes[block] == size], sorted(slot_ids), sorted(use_ids))
        taken, groups = Counter[str](), []
        for _, group in sorted(placed, key=lambda item: item[0]):
            base = (group.consumers or group.producers)[0].name
            taken[base] += 1
            groups.append(replace(group, name=base if taken[base] == 1 else f"{base}#{taken[base]}"))
        return groups

    def _group(self, sets: np.ndarray, slot_ids: list[int], use_ids: list[int]) -> list[tuple[Any, Group]]:
        """The group of some channel sets and its place in graph order, or nothing if there is nothing to say
        of it.
        """
        judged, slots = self.judged, tuple(self.numbering.slots[i] for i in slot_ids)
        numbers = [
            slot.base + np.flatnonzero(np.isin(judged.labels[slot.base : slot.base + slot.size], sets))
            for slot in slots
        ]
        uses, experts = tuple(self.uses[i] for i in use_ids), bool(judged.expert[sets].all())
        uses += self._last_product(sets) if experts else ()
        weights = [item for item in zip(slot_ids, slots, numbers, strict=True) if item[1].kind == "weight"]
        taking = {use.weight for use in uses}
        columns = {i for i, slot, _ in weights if (slot.name in taking if experts else i in self.consumes)}
        rows = {i for i, _, _ in weights if i not in columns or (i in self.produces and not experts)}
        producers, consumers = (
            tuple(self._members([item[1:] for item in weights if item[0] in side], sets))
            for side in (rows, columns)
        )
        needed = int(judged.expert[sets].max()) if experts else 1
        blocks = len(np.unique(self.block[sets]))
        is_read = bool(uses) or bool(self.multiplied[sets].all())
        is_of_buffers = not {member.name for member in (*producers, *consumers)} & self.parameters
        # Nothing in the graph speaks of some dimensions.
        is_silent = judged.status[sets[0]] in FREE and not is_read and not self.produces & {*slot_ids}
        if is_of_buffers or is_silent:
            return []
        status, reason = self._status(sets, len(sets) // blocks, needed, is_read)
        group = Group(
            "",
            len(sets),
            1 if status == FROZEN else blocks,  # frozen channels need no layout: they are shown as one block
            status,
            reason,
            producers,
            consumers,
            sets,
            self.block[sets],
            "expert" if experts else "head" if self.headed[sets].all() else "channel",
            needed,
            uses,
            slots,
            multiple=int(np.lcm.reduce(self.multiples[sets])),
        )
        at = min((self.positions[use.node] for use in uses), default=len(self.positions))
        return [((at, min(int(each.min()) for each in numbers)), group)]

    def _status(self, sets: np.ndarray, size: int, needed: int, is_read: bool) -> tuple[str, str]:
        """The status of channel sets as a group, and why."""
        status, reason = STATUS[int(self.judged.status[sets[0]])], str(self.judged.reason[sets[0]])
        free = CODE[status] in FREE
        if free and not is_read:
            return FROZEN, (
                f"{reason}, and no weight consumes what is left of them"
                if status == APPROXIMATE
                else "no weight consumes these channels"
            )
        if size == 1 and (free or (self.judged.exempt and status == EXEMPT)):
            return FROZEN, f"{LAYOUT}: one channel set takes the whole of a dimension"
        is_short = status == PRUNABLE and size <= needed
        return (FROZEN, f"each token is sent to {needed} of them") if is_short else (status, reason)

    def _last_product(self, sets: np.ndarray) -> tuple[Use, ...]:
        """The last use of a stacked weight, one block an expert: what it gives is what an expert gives."""
        by_block = [(use, use.block_numbers) for use in self.uses if use.block_numbers is not None]
        uses = [use for use, numbers in by_block if np.isin(self.judged.labels[numbers], sets).any()]
        return tuple(sorted(uses, key=lambda use: self.positions[use.node])[-1:])

    def _members(self, slots: list[tuple[Slot, np.ndarray]], sets: np.ndarray) -> Iterator[Member]:
        """One member per weight of the caller's; the parts of a split one are shown together.

        Args:
            slots: with the numbers of those channels that belong to the sets.
        """
        order = np.argsort(sets)
        pieces: dict[tuple[str, int], list[tuple[Slot, np.ndarray, np.ndarray]]] = {}
        for slot, numbers in slots:
            name, rows = self.program.origin(slot.name, slot.dim, slot.size)
            positions = order[np.searchsorted(sets[order], self.judged.labels[numbers])]
            pieces.setdefault((name, slot.dim), []).append((slot, rows[numbers - slot.base], positions))
        for (name, dim), several in pieces.items():
            slot = several[-1][0]
            # A dimension has the size that it had before its weight was split.
            parts = [part for part in self.program.parts.values() if part.source == name]
            is_split = slot.name in self.program.parts and slot.dim == parts[0].dim
            size = sum(len(part.rows) for part in parts) if is_split else slot.size
            indices, positions = (np.concatenate([piece[side] for piece in several[::-1]]) for side in (1, 2))
            indices, first = np.unique(indices, return_index=True)
            yield Member(
                name,
                dim,
                tuple(indices.tolist()),
                size,
                slot.block_dim,
                slot.blocks,
                tuple(positions[first].tolist()),
                tuple(other for other in self.names.get(name, ()) if other != name),
            )


def needed_experts(labels: np.ndarray, walk: Walk) -> np.ndarray:
    """For each channel set that is an expert, how many a router needs at once; 0 for the others.

    An expert competes with its like in a softmax or top-k, and takes a whole matrix out of a stacked weight.
    """
    needed, counts = np.zeros(int(labels.max(initial=-1)) + 1, dtype=np.int64), walk.facts.counts
    for numbers, times in counts.chosen:
        sets = labels[numbers[numbers >= 0]]
        needed[sets] = np.maximum(needed[sets], times)
    stacked = marked(len(needed), *(labels[numbers[numbers >= 0]] for numbers in counts.stacked))
    return np.where(stacked, needed, 0)
