"""How many channel sets each group loses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from .channels import attribute
from .costs import Costs
from .errors import ArgumentError, SparsityError
from .groups import EXEMPT, PRUNABLE, Group

if TYPE_CHECKING:
    from .analysis import Analysis


@dataclass(frozen=True)
class _Cut:
    """How one dimension of a counted weight shrinks with one group: positions lost per channel set."""

    group: int
    per_set: float


class Budget(ABC):
    """Sparsity as a function of the number of channel sets that each group loses.

    Sparsity is the fraction removed of all weights of linear, convolution and recurrent operators that a prunable, exempt or included group touches, each
    counted once and whole.

    Args:
        groups: the groups that can lose channel sets.
        total: how many elements the counted weights have.
    """

    def __init__(self, groups: Sequence[Group], total: int) -> None:
        self.groups, self.total = list(groups), total

    @abstractmethod
    def sparsity(self, lost: Sequence[int]) -> float:
        """The sparsity when group ``i`` loses ``lost[i]`` channel sets in all its blocks together."""

    def most(self, group: Group, round_to: int) -> int:
        """The most channel sets that one block of a group can lose."""
        least = -(-group.needed // round_to) * round_to
        return group.width - least if group.width > least else 0

    def reach(self, round_to: int) -> float:
        """The highest sparsity in reach."""
        return self.sparsity([self.most(group, round_to) * group.blocks for group in self.groups])


class ProgramBudget(Budget):
    """The budget of one program.

    Args:
        analysis: the analysis of the program.
    """

    def __init__(self, analysis: Analysis) -> None:
        counted = {PRUNABLE, EXEMPT} | analysis.include
        touched = {slot.name for group in analysis.groups if group.status in counted for slot in group.slots} & analysis.walk.facts.matrices
        self.shapes = {name: tuple(int(size) for size in attribute(analysis.program.module, name).shape) for name in sorted(touched)}
        super().__init__(analysis.chosen, sum(int(np.prod(shape)) for shape in self.shapes.values()))
        self.cuts: dict[tuple[str, int], list[_Cut]] = {}
        for index, group in enumerate(self.groups):
            for slot in group.slots:
                if slot.name in self.shapes:
                    own = analysis.labels[slot.base : slot.base + slot.size]
                    count = int(np.isin(own, group.sets).sum())
                    self.cuts.setdefault((slot.name, slot.dim), []).append(_Cut(index, count / group.size / slot.blocks))

    def sparsity(self, lost: Sequence[int]) -> float:
        left = 0.0
        for name, shape in self.shapes.items():
            sizes = [size - sum(cut.per_set * lost[cut.group] for cut in self.cuts.get((name, dim), [])) for dim, size in enumerate(shape)]
            left += float(np.prod(sizes))
        return 1 - left / self.total if self.total else 0.0


class CostAllocation(ABC):
    """An allocation that wants to know what each group costs; the cost curves are measured before it is asked."""

    @abstractmethod
    def __call__(self, budget: Budget, sparsity: float, round_to: int, costs: Costs) -> list[int]:
        """The channel sets that each block of each of the budget's groups loses."""


#: an allocation maps a budget, a sparsity and ``round_to`` to the channel sets that each block of each of the budget's groups loses
Allocation = Callable[[Budget, float, int], list[int]] | CostAllocation


def deepest_loss(group: Group) -> int:
    """The most channel sets that a block of a group can lose."""
    return max(group.width - group.needed, 0)


def validate(lost: Any, budget: Budget) -> list[int]:
    """What an allocation returned, if it can be done.

    Raises:
        ArgumentError: not one number for each group, or one that leaves less than the group needs.
    """
    found = list(lost)
    if len(found) != len(budget.groups):
        raise ArgumentError(f"the allocation returned {len(found)} numbers for {len(budget.groups)} groups; it must return one for each")
    for group, sets in zip(budget.groups, found, strict=True):
        most = deepest_loss(group)
        if isinstance(sets, bool) or not isinstance(sets, (int, np.integer)) or not 0 <= sets <= most:
            raise ArgumentError(f"the allocation takes {sets!r} channel sets from a block of '{group.name}'; give a whole number from 0 to {most}")
    return [int(sets) for sets in found]


def lost_per_block(width: int, fraction: float, round_to: int, needed: int = 1) -> int:
    """The removal nearest to ``fraction`` of a block that leaves a multiple of ``round_to``, and at least as many as are needed."""
    least = -(-needed // round_to) * round_to
    if width <= least:
        return 0
    kept = round(width * (1 - fraction) / round_to) * round_to
    return width - min(max(kept, least), width)


def check_reach(budget: Budget, sparsity: float, round_to: int) -> None:
    """Refuse a sparsity that the groups cannot reach together.

    Raises:
        SparsityError: the message says what is in reach.
    """
    reach = budget.reach(round_to)
    if sparsity > reach + 1e-12:
        raise SparsityError(
            f"sparsity={sparsity:.4g} is out of reach: the prunable groups allow at most {np.floor(reach * 1e4) / 1e4:.4f}"
            + (f" with round_to={round_to}" if round_to > 1 else "")
            + "; ask for less, or see analyze(...).groups for what is frozen and why"
        )


def uniform(budget: Budget, sparsity: float, round_to: int) -> list[int]:
    """Channel sets lost per block of each group: the same fraction of every group, found by bisection.

    Raises:
        SparsityError: the target is out of reach; the message says what is in reach.
    """
    check_reach(budget, sparsity, round_to)

    def lost(fraction: float) -> list[int]:
        return [lost_per_block(group.width, fraction, round_to, group.needed) for group in budget.groups]

    def reached(fraction: float) -> float:
        return budget.sparsity([n * group.blocks for n, group in zip(lost(fraction), budget.groups, strict=True)])

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < sparsity else (low, middle)
    return lost(min((low, high), key=lambda fraction: abs(reached(fraction) - sparsity)))


class Global(CostAllocation):
    """One threshold for all groups: channel sets go where a weight removed costs least, by the lower convex hulls of the cost curves.

    Within what steps of whole channel sets allow, this is the least sum of predicted losses for the sparsity (Shoham and Gersho, 1988; for pruning ZipLM,
    arXiv 2302.04089, section 3).
    """

    #: how often the weights that a channel set takes along are counted anew, where groups share weights
    passes = 3

    def __call__(self, budget: Budget, sparsity: float, round_to: int, costs: Costs) -> list[int]:
        """Channel sets lost per block of each group.

        Raises:
            SparsityError: the target is out of reach.
            ArgumentError: a group has no cost curve.
        """
        check_reach(budget, sparsity, round_to)
        curves = [_steps(group, round_to, costs) for group in budget.groups]
        lost = [0] * len(curves)
        for _ in range(self.passes):
            worth = [_share(budget, lost, index) for index in range(len(curves))]
            moves = sorted(
                (slope / share if share > 0 else np.inf, index, first, last)
                for index, (curve, share) in enumerate(zip(curves, worth, strict=True))
                for slope, first, last in _hull(*curve)
            )
            found = _down_to(budget, sparsity, curves, moves)
            if found == lost:
                break
            lost = found
        return lost


def _steps(group: Group, round_to: int, costs: Costs) -> tuple[np.ndarray, np.ndarray]:
    """How many channel sets of a block can go, and the loss of each."""
    if group.name not in costs:
        raise without_curve(group)
    losses, most = costs[group.name].losses, deepest_loss(group)
    if not most < len(losses) <= max(group.width, most) + 1:  # a score may say what comes after the last one that may go
        raise ArgumentError(
            f"the cost curve of '{group.name}' goes up to {len(losses) - 1} channel sets of a block, of which {most} may go here; "
            "measure with the granularity= and include= of the pruning"
        )
    counts = np.array([0, *(count for count in range(1, most + 1) if (group.width - count) % round_to == 0)])
    return counts, losses[counts]


def without_curve(group: Group) -> ArgumentError:
    """The error that a group has no cost curve."""
    if not group.uses:
        return ArgumentError(f"there is no cost curve for '{group.name}': what no weight reads has none; exclude it, or use allocation='uniform'")
    return ArgumentError(f"there is no cost curve for '{group.name}'; measure with the granularity= and include= of the pruning")


def _hull(counts: np.ndarray, losses: np.ndarray) -> list[tuple[float, int, int]]:
    """The lower convex hull of a curve: slope, first and last place of each of its edges."""
    hull = [0]
    for place in range(1, len(counts)):
        while len(hull) > 1 and _slope(counts, losses, hull[-2], hull[-1]) >= _slope(counts, losses, hull[-1], place):
            hull.pop()
        hull.append(place)
    return [(_slope(counts, losses, first, last), first, last) for first, last in pairwise(hull)]


def _slope(counts: np.ndarray, losses: np.ndarray, first: int, last: int) -> float:
    return float((losses[last] - losses[first]) / (counts[last] - counts[first]))


def _share(budget: Budget, lost: Sequence[int], index: int) -> float:
    """The sparsity that one more channel set of each block of a group brings."""
    sets = [count * group.blocks for count, group in zip(lost, budget.groups, strict=True)]
    group = budget.groups[index]
    step = -group.blocks if lost[index] >= deepest_loss(group) and lost[index] else group.blocks
    moved = [*sets[:index], sets[index] + step, *sets[index + 1 :]]
    return abs(budget.sparsity(moved) - budget.sparsity(sets))


def _down_to(budget: Budget, sparsity: float, curves: Sequence[tuple[np.ndarray, np.ndarray]], moves: Sequence[tuple[float, int, int, int]]) -> list[int]:
    """Make the moves in their order until the sparsity is reached, the last of them as far as it takes."""

    def after(count: int, part: int | None = None) -> list[int]:
        places = [0] * len(curves)
        for _, index, _, last in moves[:count]:
            places[index] = last
        if part is not None:
            places[moves[count][1]] = part
        return [int(counts[place]) for (counts, _), place in zip(curves, places, strict=True)]

    def reached(lost: list[int]) -> float:
        return budget.sparsity([count * group.blocks for count, group in zip(lost, budget.groups, strict=True)])

    low, high = 0, len(moves)  # after `low` moves too little is gone, after `high` enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reached(after(middle)) < sparsity else (low, middle)
    if not moves:
        return after(0)
    _, _, first, last = moves[low]
    return min((after(low, place) for place in range(first, last + 1)), key=lambda lost: abs(reached(lost) - sparsity))
