"""What is known of each channel set, and which sets make a group."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..capturing._program import Program
from ..patterns import find_composites
from .channels import Numbering, Remark, Walk, distinct, marked, ranked
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
    items = [distinct(labels[slot.base : slot.base + slot.size]) for slot in numbering.slots]
    uses = _uses(walk, numbering)
    items += [
        distinct(
            np.concatenate(
                [labels[walk.facts.uses[i].columns[walk.facts.uses[i].columns >= 0]] for i in together]
            )
        )
        for together in uses
    ]
    fresh = int(group_of.max(initial=-1)) + 1
    # Partition refinement: two sets stay together as long as every item holds both or neither.
    for sets in items:
        _, finer = ranked(group_of[sets])
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
            frozenset(use for i in held_by if i >= offset for use in uses[i - offset]),
        )
        for index, held_by in touching.items()
    }
    return group_of, keys


def _uses(walk: Walk, numbering: Numbering) -> list[list[int]]:
    """The uses of weights, by index; those that each take a matrix of one stack, numbered apart, are one use
    of the stack.
    """
    found: dict[object, list[int]] = {}
    for index, use in enumerate(walk.facts.uses):
        slots = [numbering.get(*slot) for slot in use.slots]
        stacked = any(
            slot is not None and slot.block_dim is not None and use.columns.size < slot.size for slot in slots
        )
        found.setdefault((use.weight, use.slots) if stacked else index, []).append(index)
    return list(found.values())


__all__ = ["CODE", "LAYOUT", "STATUS", "ChannelSets", "Keys", "group_sets"]
