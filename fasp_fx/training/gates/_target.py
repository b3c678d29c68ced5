"""What gates stand for: those below one threshold are closed, whatever group they are of, so that the budget
is met.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...allocation import Budget, CostAllocation, check_reach, deepest_loss
from ...allocation.costs import CostCurve, Costs
from ...analysis._analysis import Analysis
from ...analysis.groups import Group, by_block
from ...calibration._visit import Decision
from ...capturing._program import Program
from ...errors import ArgumentError, SparsityError
from ...pruning._allocating import allocate, budget_for, check_request, counted
from ...pruning._method import Method
from ...pruning.config import PruningConfig

#: stands for the chance of what has no gate, so that it goes last
_CLOSED = 1e6
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


class Target:
    """What is asked of the gates of a model, which no training changes and all copies share.

    Args:
        program: the model as it was captured without gates.
        groups: those that have gates.
        config: what is asked for.

    Raises:
        SparsityError, BudgetError: it is out of reach.
    """

    def __init__(
        self, program: Program, analysis: Analysis, groups: list[Group], config: PruningConfig
    ) -> None:
        self.program, self.analysis, self.groups = program, analysis, groups
        self._method = Method.of(config)
        self.budget = budget_for(config, analysis.chosen, lambda cap: counted(analysis, cap))
        none = self._costs([np.zeros(group.size) for group in groups])
        check_request(self._method, self.budget, analysis.groups, none)

    def __deepcopy__(self, memo: dict[int, Any]) -> Target:
        return self

    def gone(self, chances: list[np.ndarray]) -> list[np.ndarray]:
        """Which channel sets go, ``[sets]`` for each group.

        Args:
            chances: how probable it is that each stays, ``[sets]`` for each group.

        Raises:
            ArgumentError: they are none, as where training has made scores NaN; names the group.
            SparsityError: the groups that have gates cannot meet the budget.
        """
        for group, own in zip(self.groups, chances, strict=True):
            if own.shape != (group.size,) or not ((own >= 0) & (own <= 1)).all():
                raise ArgumentError(
                    f"the chances of the gates of '{group.name}' are not {group.size} numbers from 0 to 1;"
                    " training has made their scores NaN, which a lower learning rate may prevent, or"
                    " chances() of your kind= is wrong"
                )
        counts, _ = allocate(self._method, self.budget, self.analysis.groups, self._costs(chances))
        lost = {group.name: count for group, count in zip(self.budget.groups, counts, strict=True)}
        if beyond := [
            name for name in lost if lost[name] and name not in {group.name for group in self.groups}
        ]:
            raise SparsityError(
                f"the groups that have gates do not reach the budget; '{beyond[0]}' has none; ask for less"
            )
        found = []
        for group, own in zip(self.groups, chances, strict=True):
            members = np.stack(by_block(group.block_of))
            order = np.take_along_axis(members, np.argsort(own[members], 1, kind="stable"), 1)
            found.append(np.isin(np.arange(group.size), order[:, : lost[group.name]]))
        return found

    def decision(self, gone: list[np.ndarray]) -> Decision:
        """What is removed where these channel sets go, ``[sets]`` for each group."""
        labels = self.analysis.labels
        sets = np.concatenate([group.sets[own] for group, own in zip(self.groups, gone, strict=True)])
        return Decision(np.isin(labels, sets))

    def _costs(self, chances: list[np.ndarray]) -> Costs:
        """Chances in the place of costs, the least first."""
        curves = {
            group.name: CostCurve(np.arange(group.width + 1) * _CLOSED) for group in self.analysis.chosen
        }
        for group, own in zip(self.groups, chances, strict=True):
            rows = np.sort(own[np.stack(by_block(group.block_of))], 1)
            curves[group.name] = CostCurve(np.concatenate([[0.0], np.cumsum(rows.mean(0))]))
        return Costs(curves, "")


__all__ = ["Target", "Threshold"]
