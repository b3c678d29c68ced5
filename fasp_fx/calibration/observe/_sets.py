"""Which channel set of a group a channel number belongs to."""

from __future__ import annotations

import numpy as np

from ...analysis.groups import Group


def sets_in(group: Group, labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """For channel numbers of any shape, which of a group's channel sets each belongs to, counted in the order
    of ``group.sets``; -1 where none.

    Args:
        labels: the channel set of each channel number.
    """
    sets = np.where(numbers >= 0, labels[np.maximum(numbers, 0)], -1)
    member = np.isin(sets, group.sets)
    order = np.argsort(group.sets)
    found = np.full(numbers.shape, -1)
    found[member] = order[np.searchsorted(group.sets[order], sets[member])]
    return found


__all__ = ["sets_in"]
