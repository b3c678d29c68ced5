"""Which channel sets must be removed in equal numbers, so that every tensor stays a box.

A tensor ``[heads, d]`` may lose different channels in each row but the same number in each. From all such
tensors (*boxes*) this derives the blocks of every group, and finds the boxes that no choice of blocks can
keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import fx

from .channels import Numbering, Slot, counted, distinct, ranked


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
        _, finer = ranked(block[members] * numbers.shape[0] + first_row)
        # Sets outside this box keep their block, which is thereby told apart from those inside.
        block[members] = fresh + finer
        fresh += int(finer.max()) + 1
    _, block = ranked(block)
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
        sets = distinct(labels[numbers])
        sets = sets[free[sets]]
        own, which = ranked(block[sets])
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
            yield slot, distinct(torn)


def _uneven(
    rows: np.ndarray, sets: np.ndarray, count: int, block: np.ndarray, sizes: np.ndarray, group_of: np.ndarray
) -> np.ndarray:
    """The channel sets of a box that equal counts per block do not keep equal in every row."""
    # Pairs of a row and a set, and then of a row and a block, as one number each.
    pairs, times = counted(rows * len(block) + sets)
    row, member = np.divmod(pairs, len(block))
    owners, own = ranked(block[member])
    parts, inverse = ranked(row * len(owners) + own)
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
    _, kind_index = ranked(representative[block_of] * (int(sizes.max()) + 1) + sizes[block_of])
    totals = np.zeros((int(kind_index.max()) + 1, count), dtype=np.int64)
    np.add.at(totals, (kind_index, row_of), low)
    uneven = (totals != totals[:, :1]).any(axis=1)
    wrong = broken | uneven[kind_index]
    return distinct(member[wrong[inverse]])
