"""What is known of each channel set, which sets make a group, and which must be removed in equal numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import fx

from ..capturing._program import Program
from ..patterns import find_composites
from .channels import Numbering, Remark, Slot, Walk, marked
from .groups import APPROXIMATE, EXEMPT, FROZEN, PRUNABLE

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
            :mod:`fasp_fx.analysis._build_groups`).
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
    stay as they are.
    """
    composites = find_composites(program.module.graph)
    status = np.full(len(expert), CODE[PRUNABLE], dtype=np.int8)
    reason = np.full(len(expert), "", dtype=object)

    def mark(remarks: list[Remark], code: str) -> None:
        for remark in reversed(remarks):  # the first remark in graph order is the one shown
            sets = labels[remark.numbers]
            sets = sets[expert[sets] == 0] if remark.routing else sets
            status[sets] = CODE[code]
            inside = composites.get(remark.node) if remark.node is not None else None
            reason[sets] = f"{remark.reason} of {inside}" if inside else remark.reason

    if exempt:
        mark(walk.facts.exempt, EXEMPT)
    mark(walk.facts.mixed, APPROXIMATE)
    mark(_windows_seen(labels, walk), FROZEN)
    mark(walk.facts.frozen, FROZEN)
    if not exempt:
        mark(walk.facts.exempt, EXEMPT)
    return status, reason


def _windows_seen(labels: np.ndarray, walk: Walk) -> list[Remark]:
    """Remarks on positions of windows that are something else as well: a kernel that is computed, or a weight
    that is read in another way elsewhere.
    """
    facts = walk.facts
    elsewhere = [
        *(numbers for numbers, _ in facts.produced),
        *(use.columns.reshape(-1) for use in facts.uses),
        *(product.numbers for product in facts.products),
    ]
    if not facts.inside or not elsewhere:
        return []
    numbers = np.concatenate(elsewhere)
    seen = marked(int(labels.max(initial=-1)) + 1, labels[numbers[numbers >= 0]])
    found = (replace(remark, numbers=remark.numbers[seen[labels[remark.numbers]]]) for remark in facts.inside)
    return [remark for remark in found if remark.numbers.size]


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
    touching: dict[int, list[int]] = {index: [] for index in range(len(first))}
    representative = np.full(found.count, -1, dtype=np.int64)
    representative[first] = np.arange(len(first))
    for item, sets in enumerate(items):
        held = representative[sets]
        for index in held[held >= 0]:
            touching[int(index)].append(item)
    keys = {
        index: (
            frozenset(i for i in held_by if i < offset),
            frozenset(i - offset for i in held_by if i >= offset),
        )
        for index, held_by in touching.items()
    }
    return group_of, keys


# --- Blocks: a tensor ``[heads, d]`` may lose different channels in each row but the same number in each.
# From all such tensors (*boxes*) the blocks of every group follow, and the boxes that no blocks can keep.


@dataclass(frozen=True)
class Conflict:
    """A tensor that would stop being a box: ``classes`` are the channel sets concerned."""

    node: fx.Node
    classes: np.ndarray


def find_blocks(
    boxes: list[tuple[np.ndarray, fx.Node]],
    labels: np.ndarray,
    group_of: np.ndarray,
    needed: Iterable[np.ndarray] = (),
) -> tuple[np.ndarray, list[Conflict]]:
    """Refine each group into blocks and check every box.

    Args:
        boxes: number tensors ``[rows, length]`` that shrink along their length.
        labels: the channel set of each channel number.
        group_of: the group of each channel set; negative for those that are never removed.
        needed: channel numbers, of each of which some must stay, as some do of every block.

    Returns:
        The block of each channel set, unique over all groups, and the boxes that cannot stay one.
    """
    block = _needed_blocks(needed, labels, group_of)
    fresh = int(block.max(initial=0)) + 1
    tables = []
    for numbers, node in boxes:
        sets = np.where(numbers >= 0, labels[np.maximum(numbers, 0)], -1)
        candidate = (sets >= 0) & (group_of[np.maximum(sets, 0)] >= 0)
        if not candidate.any():
            continue
        rows, columns = np.nonzero(candidate)
        tables.append((rows, sets[rows, columns], numbers.shape[0], node))
        members, first = np.unique(sets[rows, columns], return_index=True)
        first_row = rows[first]
        _, finer = np.unique(block[members] * numbers.shape[0] + first_row, return_inverse=True)
        # Sets outside this box keep their block, which is thereby told apart from those inside.
        block[members] = fresh + finer
        fresh += int(finer.max()) + 1
    _, block = np.unique(block, return_inverse=True)
    sizes = np.bincount(block[group_of >= 0], minlength=int(block.max(initial=0)) + 1)
    conflicts = []
    for rows, sets, count, node in tables:
        bad = _uneven(rows, sets, count, block, sizes, group_of)
        if bad.size:
            conflicts.append(Conflict(node, bad))
    return block, conflicts


def _needed_blocks(needed: Iterable[np.ndarray], labels: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """A block for each group, and one for what is needed of a group beside the rest."""
    block, free = group_of.astype(np.int64) - int(group_of.min(initial=0)), group_of >= 0
    sizes = np.bincount(block[free])
    for numbers in needed:
        sets = np.unique(labels[numbers])
        sets = sets[free[sets]]
        own, which = np.unique(block[sets], return_inverse=True)
        beside = (np.bincount(which, minlength=len(own)) < sizes[own])[which]
        if beside.any():
            block[sets[beside]] = len(sizes) + which[beside]
            sizes = np.bincount(block[free])
    return block


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
    rows: np.ndarray, sets: np.ndarray, count: int, block: np.ndarray, sizes: np.ndarray, group_of: np.ndarray
) -> np.ndarray:
    """The channel sets of a box that equal counts per block do not keep equal in every row."""
    # Pairs of a row and a set, and then of a row and a block, as one number each.
    pairs, times = np.unique(rows * len(block) + sets, return_counts=True)
    row, member = np.divmod(pairs, len(block))
    owners, own = np.unique(block[member], return_inverse=True)
    parts, inverse = np.unique(row * len(owners) + own, return_inverse=True)
    row_of, block_of = parts // len(owners), owners[parts % len(owners)]
    present = np.bincount(inverse)
    low = np.full(len(present), np.iinfo(np.int64).max)
    np.minimum.at(low, inverse, times)
    high = np.zeros(len(present), dtype=np.int64)
    np.maximum.at(high, inverse, times)
    broken = (present != sizes[block_of]) | (low != high)
    # Blocks of one group and one size lose equal counts; each row must hold the same number of them, with
    # multiplicity.
    representative = np.zeros(len(sizes), dtype=np.int64)
    representative[owners[own]] = group_of[member]
    _, kind_index = np.unique(
        representative[block_of] * (int(sizes.max()) + 1) + sizes[block_of], return_inverse=True
    )
    totals = np.zeros((int(kind_index.max()) + 1, count), dtype=np.int64)
    np.add.at(totals, (kind_index, row_of), low)
    uneven = (totals != totals[:, :1]).any(axis=1)
    wrong = broken | uneven[kind_index]
    return np.unique(member[wrong[inverse]])


__all__ = [
    "CODE",
    "LAYOUT",
    "STATUS",
    "ChannelSets",
    "Conflict",
    "Keys",
    "find_blocks",
    "group_sets",
    "torn_blocks",
]
