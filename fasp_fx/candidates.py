"""Several prunings to the same budget, judged by a function of the user's, of which the best is returned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from ._options import is_number
from ._seeded import seed_of
from .allocation import Allocation, Budget, Global
from .costs import CostCurve, Costs
from .errors import ArgumentError

Pruned = TypeVar("Pruned")


class Varied(Global):
    """As :class:`fasp_fx.allocation.Global`, with each group's cost curve multiplied by a random factor, so
    that another allocation meets the same budget.

    Predicted losses are estimates: allocations whose predictions differ by less than their errors may turn
    out either way.

    Args:
        seed: of the factors; a group's does not depend on which other groups there are.
        spread: factors are ``exp(spread · z)`` with z from the standard normal distribution.

    Raises:
        ArgumentError: the spread is no number from zero on.
    """

    def __init__(self, seed: int, spread: float = 0.25) -> None:
        if not is_number(spread) or not 0 <= spread < math.inf:
            raise ArgumentError(
                f"spread={spread!r} is not a finite number from zero on; 0.25 changes predicted losses by"
                " about a quarter"
            )
        self.seed, self.spread = seed, spread

    def __call__(self, budget: Budget, round_to: int, costs: Costs) -> list[int]:
        """Channel sets lost per block of each group; errors as for :class:`fasp_fx.allocation.Global`."""
        curves = {name: CostCurve(curve.losses * self._factor(name)) for name, curve in costs.items()}
        return super().__call__(budget, round_to, costs.with_curves(curves))

    def _factor(self, name: str) -> float:
        return math.exp(self.spread * float(np.random.default_rng(seed_of(self.seed, name)).normal()))


@dataclass(frozen=True)
class Best(Generic[Pruned]):
    """The best of several candidates.

    Attributes:
        result: what the pruning of the best one returned.
        index: which it was, counted from zero; 0 is :class:`fasp_fx.allocation.Global`.
        worth: what the judge said of each.
    """

    result: Pruned
    index: int
    worth: tuple[float, ...]


def best_of(
    number: int,
    prune: Callable[[Allocation], Pruned],
    judge: Callable[[Pruned], float],
    *,
    spread: float = 0.25,
    seed: int = 0,
) -> Best[Pruned]:
    """Prune several times with different allocations, and keep the result that a function of yours likes
    best.

    One result is kept at a time beside the one that is being made. Give ``prune`` a captured model and
    measured costs, so that neither is made again::

        captured = fasp_fx.capture(model, args)
        costs = fasp_fx.measure(captured, calibration=batches[:4])
        best = best_of(
            4,
            lambda allocation: fasp_fx.prune(captured, calibration=batches, sparsity=0.2, costs=costs,
            allocation=allocation), lambda result: accuracy(result.module),
        )

    Args:
        number: how many candidates; the first is :class:`fasp_fx.allocation.Global`, so that the best is no
            worse than what that gives.
        prune: prunes with the allocation that it is given, and returns anything.
        judge: the worth of what ``prune`` returned, on data that calibration did not see; the larger the
            better.
        spread, seed: as for :class:`Varied`.

    Raises:
        ArgumentError: ``number`` is no positive integer, or the judge returns no number or finds no candidate
            worth a finite one. What ``prune`` and ``judge`` raise is passed on.
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ArgumentError(f"number={number!r} is not a positive integer; 4 compares four allocations")
    best: tuple[Pruned, int] | None = None
    worth: list[float] = []
    for index in range(number):
        made = prune(Varied(seed + index, spread) if index else Global())
        found = judge(made)
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise ArgumentError(
                f"the judge returned a {type(found).__name__}; it must return a number, the larger the better"
            )
        worth.append(float(found))
        if math.isfinite(worth[-1]) and (best is None or worth[-1] > worth[best[1]]):
            best = made, index
    if best is None:
        raise ArgumentError(
            f"the judge found no candidate worth a finite number: {', '.join(map(str, worth))}"
        )
    return Best(*best, tuple(worth))


__all__ = ["Best", "Varied", "best_of"]
