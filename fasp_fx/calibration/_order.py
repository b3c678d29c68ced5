"""The order in which the channel sets of a group go, whatever decides it: its consumers, a product of
activations, or its producers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..allocation._limits import deepest_loss
from ..allocation.costs import CostCurve
from ..analysis._analysis import Analysis
from ..analysis.groups import Group
from ..base._tolerable import tolerable
from ..errors import ArgumentError
from ._consumers import Consumer, Consumers
from ._products import ObservedProducts, row_scores
from .obs import DAMPING, damped_inverse, spread_of
from .scoring import ByColumns, Columns, GroupColumns, GroupScore, Order, by_set, by_value
from .statistics import InputGradients


def order_of(
    consumers: Consumers,
    group: Group,
    score: GroupScore,
    observed: bool,
    deepest: int,
    weight_of: Callable[[Consumer], Tensor],
) -> Order:
    """The order of one group.

    Args:
        observed: whether anything was, of consumers and products of activations.
        deepest: how many channel sets of a block may go at most.
        weight_of: what a consumer's weight is now.

    Raises:
        ArgumentError: the score returned an order that is none, or cannot say one for a group without
            consumers.
        CalibrationError: a score is not finite.
    """
    view, products = consumers.view(group, deepest, weight_of), consumers.products
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
        or (sets.size and not np.issubdtype(sets.dtype, np.integer))
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
    losses = None if order.losses is None else _array(order.losses, np.float64)
    if order.losses is not None and (
        losses is None or losses.shape != (sets.shape[1] + 1,) or not np.isfinite(losses).all()
    ):
        raise ArgumentError(
            f"the score's losses for '{view.name}' are not one finite number for each number of channel sets"
            f" from 0 to {sets.shape[1]}"
        )
    return Order(sets.astype(np.int64), losses)


def _array(given: Any, dtype: type[np.float64] | None = None) -> np.ndarray | None:
    """What a score gave as an array; ``None`` where it is none (of numbers)."""
    try:
        return np.asarray(given, dtype)
    except tolerable(ValueError, TypeError, RuntimeError):
        return None


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


def orders_of(consumers: Consumers, groups: Sequence[Group], score: GroupScore) -> dict[str, Order]:
    """The order of each group, with its losses.

    A score that predicts losses gives its own. Of another, the order is taken, and each column costs ``½ Q_jj
    √(G_jj / [G⁻¹]_jj)``. Without repair it would cost ``½ Q_jj G_jj``, and ``½ Q_jj / [G⁻¹]_jj`` if all
    others stayed and were repaired (:class:`fasp_fx.obs.OBS`); since many go that would make up for one
    another, what it costs lies between, and the geometric mean stands for that. What no weight reads, but a
    product of activations, costs what the loss loses with it, or where no loss was run back, its part of the
    product's energy.

    Args:
        consumers: those of the groups, with Gram matrices and, where a loss was given, gradients.
    """
    found = {}
    for group in groups:
        order = order_of(consumers, group, score, True, deepest_loss(group), consumers.weight)
        if order.losses is None:
            view = consumers.view(group, order.sets.shape[1], consumers.weight)
            order = Order(
                order.sets,
                _added_up(
                    by_set(view, _column_costs) if group.uses else _product_costs(consumers.products, group),
                    order,
                ),
            )
        if not group.uses:
            assert order.losses is not None
            order = Order(order.sets[:, : deepest_loss(group)], order.losses[: deepest_loss(group) + 1])
        found[group.name] = order
    return found


def curves_of(orders: Mapping[str, Order]) -> dict[str, CostCurve]:
    """The cost curve of each group, from its order with losses."""
    return {name: CostCurve(order.losses) for name, order in orders.items() if order.losses is not None}


def _product_costs(products: ObservedProducts, group: Group) -> np.ndarray:
    """What each channel set costs that no weight reads, shape ``[sets]``."""
    if not products.of(group):
        return np.zeros(group.size)
    costs = products.costs(group)
    if costs is not None:
        return costs
    energy = products.scores(group) ** 2
    return 0.5 * energy / max(float(energy.sum()), 1e-300)


def _added_up(costs: np.ndarray, order: Order) -> np.ndarray:
    """The losses in an order that is given, by the costs of the channel sets."""
    return np.concatenate([[0.0], np.cumsum(costs[order.sets].sum(0))])


def _column_costs(columns: Columns) -> np.ndarray:
    """``½ Q_jj √(G_jj / [G⁻¹]_jj)`` of each column, shape ``[columns]``."""
    gram = spread_of(columns)
    energies = gram.diagonal().clamp_min(0)
    if not float(energies.sum()) > 0:
        return np.zeros(len(gram))
    alone = energies / damped_inverse(columns, gram, DAMPING).diagonal()
    own = columns.weight.abs().to(gram.dtype).square().sum(0)
    gradients = columns.seen.get("gradients")
    if not isinstance(gradients, InputGradients) or not gradients.tokens:
        # By the relative squared error of the output.
        curvature = own / max(float((own * energies).sum()), 1e-300)
    else:
        squares = gradients.mean_squares()
        curvature = own * gradients.mean_square() if squares is None else squares.to(gram)
    return (0.5 * curvature * alone.clamp_min(0).sqrt()).cpu().numpy().astype(np.float64)


__all__ = ["Planned", "curves_of", "order_of", "orders_of"]
