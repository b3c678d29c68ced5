"""Orders and cost curves of a program's groups, from what was seen of the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...allocation._allocation import deepest_loss
from ...allocation.costs import CostCurve
from ...analysis.groups import Group
from ..obs import DAMPING, damped_inverse, spread_of
from ..scoring import Columns, GroupScore, Order, by_set
from ..statistics import InputGradients
from ._consumers import Consumers
from ._order import order_of
from ._products import ObservedProducts


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
        order = order_of(
            consumers, group, score, consumers.products, True, deepest_loss(group), consumers.weight
        )
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


__all__ = ["curves_of", "orders_of"]
