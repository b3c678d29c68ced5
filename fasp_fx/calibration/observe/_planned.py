"""The order that a plan stands for, whatever chose it."""

from __future__ import annotations

import numpy as np

from ...analysis._analysis import Analysis
from ..scoring import GroupColumns, GroupScore, Order


class Planned(GroupScore):
    """Takes of each group the channel sets that were chosen before, in no order.

    Args:
        analysis: the analysis of the program.
        gone: for every channel number, whether it goes.

    Attributes:
        lost: channel sets that each block of each chosen group loses.
    """

    def __init__(self, analysis: Analysis, gone: np.ndarray) -> None:
        sets = np.unique(analysis.labels[: len(gone)][gone])
        self._orders: dict[str, np.ndarray] = {}
        self.lost: list[int] = []
        for group in analysis.chosen:
            taken = np.flatnonzero(np.isin(group.sets, sets))
            rows = [taken[group.block_of[taken] == block] for block in np.unique(group.block_of)]
            self._orders[group.name] = np.stack(rows)
            self.lost.append(len(rows[0]))

    def __call__(self, group: GroupColumns) -> Order:
        return Order(self._orders[group.name])


__all__ = ["Planned"]
