"""What gates stand for: those below one threshold are closed, whatever group they are of."""

from __future__ import annotations

import numpy as np

from ...allocation._allocation import Budget, CostAllocation, check_reach, deepest_loss
from ...allocation.costs import Costs

#: by how much the last of a group's gates counts more than the first, so that of equal ones the same part
#: goes from every group
_TIE = 1e-9


class Threshold(CostAllocation):
    """Closes the gates with the least chances to be open, as many as meet the budget best (GRASPrune, arXiv
    2604.19398; CoFi, 2204.00408).

    Of layers that lose alike the mean of the chances counts: a gate is held against one threshold, however
    many layers its place stands for.
    """

    averages = True

    def __call__(self, budget: Budget, round_to: int, costs: Costs) -> list[int]:
        """Channel sets lost per block of each group; arguments and errors as for
        :class:`fasp_fx.allocation.Global`.
        """
        check_reach(budget, round_to)
        chances = []
        for group in budget.groups:
            own = np.diff(costs[group.name].losses)[: deepest_loss(group)]
            chances.append(own + _TIE * (np.arange(len(own)) + 1) / group.width)
        thresholds = np.unique(np.concatenate([np.zeros(1), *chances]))

        def lost(place: int) -> list[int]:
            counts = (int(np.searchsorted(own, thresholds[place], "right")) for own in chances)
            stay = (
                -(-(group.width - count) // group.step(round_to)) * group.step(round_to)
                for group, count in zip(budget.groups, counts, strict=True)
            )
            return [
                group.width - min(kept, group.width) for group, kept in zip(budget.groups, stay, strict=True)
            ]

        low, high = 0, len(thresholds) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if budget.over(lost(middle)) > 0 else (low, middle)
        return budget.closest([lost(low), lost(high)])


__all__ = ["Threshold"]
