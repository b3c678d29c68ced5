"""Search among allocations that meet one budget by trying them: steps are exchanged between groups, and the
better half of what is tried goes on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ._limits import Budget

#: at most so many pairs of groups exchange steps at once
PAIRS = 3
#: an exchange is drawn so often before it is given up: steps may be too coarse for most pairs to keep the
#: budget
ATTEMPTS = 50
#: a group loses more by at most this part of its channel sets, in the first generation and in the last
COARSE, FINE = 1 / 8, 1 / 64
#: of what is tried on some sequences, one in so many is tried on twice as many
SURVIVING = 3
_ROUNDING = 1e-12


class Trial(ABC):
    """A way to find out what an allocation really costs.

    Attributes:
        count: how many calibration sequences there are to try it on.
    """

    count: int

    @abstractmethod
    def losses(self, lost: Sequence[int], sequences: Sequence[int]) -> list[float]:
        """The loss of the pruned model on each of some sequences, infinite where it is not finite.

        Args:
            lost: channel sets that each block of each of the budget's groups loses.
            sequences: their numbers, from 0 to ``count - 1``.
        """

    def progress(self, fraction: float) -> None:  # noqa: B027
        """Say how much of a search is done."""

    def note(self, before: float, after: float, tried: int) -> None:  # noqa: B027
        """Say what came of a search: the mean loss over all sequences where it began and ended, and how many
        candidates were tried.
        """


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        lost: the best allocation.
        loss: its mean loss over all sequences.
        first: that of the allocation that the search began with.
        tried: how many others were tried.
    """

    lost: list[int]
    loss: float
    first: float
    tried: int


class Exchanges:
    """Moves from one allocation to others that meet the budget as nearly.

    Under ceilings, no more than they allow ever stays. A sparsity is met as nearly as at the start, or to
    half of the smallest step of any group.

    Args:
        budget: what is to be met.
        counts: for each group, how many channel sets a block can lose, in rising order.
        start: where the search begins.
    """

    def __init__(self, budget: Budget, counts: Sequence[Sequence[int]], start: Sequence[int]) -> None:
        self._budget, self._counts = budget, counts
        self._free = [index for index, own in enumerate(counts) if len(own) > 1]
        over = budget.over(start)
        steps = [
            abs(budget.over(_with(start, index, self._neighbour(index, start[index]))) - over)
            for index in self._free
        ]
        self._slack = max(abs(over), min(steps, default=0.0) / 2) + _ROUNDING

    def drawn(self, lost: Sequence[int], reach: float, draw: np.random.Generator) -> list[int] | None:
        """Another allocation, in which some pairs of groups have exchanged steps; ``None`` where none was
        found.

        Args:
            reach: the largest part of its channel sets that a group loses more in one exchange; a single step
                may always be exchanged.
        """
        for _ in range(ATTEMPTS if len(self._free) > 1 else 0):
            found = list(lost)
            for _ in range(int(draw.integers(1, PAIRS + 1))):
                more, less = draw.choice(self._free, 2, replace=False).tolist()
                found = self._exchanged(found, more, less, reach, draw)
            if any(after < before for after, before in zip(found, lost, strict=True)) and self.meets(found):
                return found
        return None

    def meets(self, lost: Sequence[int]) -> bool:
        """Whether an allocation meets the budget as nearly as it has to."""
        over = self._budget.over(lost)
        return over <= 0 if self._budget.is_ceiling else abs(over) <= self._slack

    def _exchanged(
        self, lost: list[int], more: int, less: int, reach: float, draw: np.random.Generator
    ) -> list[int]:
        """One group loses more, and another less by as many steps as give the budget back."""
        own, other = self._counts[more], self._counts[less]
        step = int(draw.integers(1, max(round(reach * (len(own) - 1)), 1) + 1))
        raised = _with(lost, more, own[min(bisect_left(own, lost[more]) + step, len(own) - 1)])
        low, high = 0, bisect_left(other, lost[less])
        while low < high:  # the least place at which enough goes
            middle = (low + high) // 2
            low, high = (
                (middle + 1, high)
                if self._budget.over(_with(raised, less, other[middle])) > 0
                else (low, middle)
            )
        return self._budget.closest(_with(raised, less, other[place]) for place in (low, max(low - 1, 0)))

    def _neighbour(self, index: int, count: int) -> int:
        own = self._counts[index]
        place = bisect_left(own, count)
        return own[place + 1 if place + 1 < len(own) else place - 1]


def evolve(
    exchanges: Exchanges, start: list[int], trial: Trial, generations: int, offspring: int, seed: int
) -> Found:
    """The best allocation found: in each generation some are drawn from the best so far, and take its place
    only where one is better on all sequences.

    Args:
        start: where the search begins; what is found is never worse on all sequences.
        trial: judges candidates.
        generations, offspring: how many times how many are drawn.
        seed: of what is drawn.
    """
    first = _mean(trial.losses(start, range(trial.count)))
    found = Found(start, first, first, 0)
    for generation in range(generations):
        draw = np.random.default_rng((seed, generation))
        reach = COARSE * (FINE / COARSE) ** (generation / max(generations - 1, 1))
        drawn = [exchanges.drawn(found.lost, reach, draw) for _ in range(offspring)]
        candidates = list(
            dict.fromkeys(tuple(lost) for lost in drawn if lost is not None and lost != found.lost)
        )
        best, loss = _best(candidates, trial, draw)
        if not loss < found.loss:
            best, loss = tuple(found.lost), found.loss
        found = Found(list(best), loss, first, found.tried + len(candidates))
        trial.progress((generation + 1) / generations)
    return found


def passes(generations: int, offspring: int, sequences: int) -> int:
    """How many times a search runs a sequence at most, the dense model's runs among them."""
    found, alive, tried, size = 2 * sequences, offspring, 0, 1
    while tried < sequences:
        found += generations * alive * (size - tried)
        alive, tried, size = -(-alive // SURVIVING), size, min(2 * size, sequences)
    return found


def _best(
    candidates: Sequence[tuple[int, ...]], trial: Trial, draw: np.random.Generator
) -> tuple[tuple[int, ...], float]:
    """The candidate that did best, and its mean loss over all sequences: all are tried on one, the best of
    them on two, and so on.
    """
    order = draw.permutation(trial.count).tolist()
    alive, seen = list(candidates), {lost: list[float]() for lost in candidates}
    tried, size = 0, 1
    while alive:
        for lost in alive:
            seen[lost] += trial.losses(lost, order[tried:size])
        alive.sort(key=lambda lost: _mean(seen[lost]))
        if size == trial.count:
            return alive[0], _mean(seen[alive[0]])
        alive = alive[: -(-len(alive) // SURVIVING)]
        tried, size = size, min(2 * size, trial.count)
    return (), math.inf


def _mean(losses: Sequence[float]) -> float:
    """The mean, which does not depend on the order."""
    return math.fsum(losses) / len(losses)


def _with(lost: Sequence[int], index: int, count: int) -> list[int]:
    return [*lost[:index], count, *lost[index + 1 :]]


__all__ = ["Exchanges", "Found", "Trial", "evolve", "passes"]
