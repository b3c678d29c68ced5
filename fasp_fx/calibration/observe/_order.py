"""The order in which the channel sets of a group go, whatever decides it: its consumers, a product of
activations, or its producers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from ...analysis.groups import Group
from ...base._tolerable import tolerable
from ...errors import ArgumentError
from ..scoring import ByColumns, GroupColumns, GroupScore, Order, by_value
from ._consumers import Consumer, Consumers
from ._planned import Planned
from ._products import ObservedProducts, row_scores


def order_of(
    consumers: Consumers,
    group: Group,
    score: GroupScore,
    products: ObservedProducts,
    observed: bool,
    deepest: int,
    weight_of: Callable[[Consumer], Tensor],
) -> Order:
    """The order of one group.

    Args:
        products: what was seen of products of activations, if anything was ``observed``.
        deepest: how many channel sets of a block may go at most.
        weight_of: what a consumer's weight is now.

    Raises:
        ArgumentError: the score returned an order that is none, or cannot say one for a group without
            consumers.
        CalibrationError: a score is not finite.
    """
    view = consumers.view(group, deepest, weight_of)
    if isinstance(score, Planned):
        return score(view)
    if not view.consumers:
        if not products.of(group):
            return by_value(view, np.zeros(group.size))  # nothing reads it
        if observed and score.needs_data:
            costs = products.costs(group)
            return by_value(view, products.scores(group) if costs is None else costs)
        if isinstance(score, ByColumns):
            return by_value(view, row_scores(consumers.analysis, group, score, consumers.within))
        raise ArgumentError(
            f"no weight reads the channels of '{view.name}', and {type(score).__name__} orders those of"
            " weights alone; exclude it"
        )
    return checked(score(view), view)


def checked(order: Order, view: GroupColumns) -> Order:
    """What a score returned, as arrays, if it is an order of the group.

    Raises:
        ArgumentError: channel sets of each block do not stand in it once, or not as many as may go, or losses
            do not fit.
    """
    if not isinstance(order, Order):
        raise ArgumentError(
            f"the score returned a {type(order).__name__} for '{view.name}'; return a fasp_fx.scoring.Order"
        )
    sets, members = _array(order.sets), view.members
    if (
        sets is None
        or not (np.issubdtype(sets.dtype, np.integer) or not sets.size)
        or sets.ndim != 2
        or len(sets) != len(members)
        or sets.shape[1] < view.deepest
        or any(
            len(np.unique(row)) != len(row) or not np.isin(row, own).all()
            for row, own in zip(sets, members, strict=True)
        )
    ):
        raise ArgumentError(
            f"the score's order for '{view.name}' is none of its channel sets: give for each of its"
            f" {len(members)} blocks at least {view.deepest} of the block's own, each once"
        )
    sets = sets.astype(np.int64)
    losses = None if order.losses is None else _array(order.losses, np.float64)
    if order.losses is not None and (
        losses is None or losses.shape != (sets.shape[1] + 1,) or not np.isfinite(losses).all()
    ):
        raise ArgumentError(
            f"the score's losses for '{view.name}' are not one finite number for each number of channel sets"
            f" from 0 to {sets.shape[1]}"
        )
    return Order(sets, losses)


def _array(given: Any, dtype: type[np.float64] | None = None) -> np.ndarray | None:
    """What a score gave as an array; ``None`` where it is none (of numbers)."""
    try:
        return np.asarray(given, dtype)
    except tolerable(ValueError, TypeError, RuntimeError):
        return None


__all__ = ["order_of"]
