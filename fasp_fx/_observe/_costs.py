"""Orders and cost curves of a program's groups, from what was seen of the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..allocation import deepest_loss
from ..costs import CostCurve
from ..groups import Group
from ..obs import OBS, Elimination
from ..scoring import GroupScore, Order
from ._consumers import Consumers
from ._order import order_of
from ._products import ObservedProducts


def orders_of(consumers: Consumers, groups: Sequence[Group], score: GroupScore) -> dict[str, Order]:
    """The order of each group, with its losses; those whose channels no weight reads have none.

    A score that predicts losses gives its own. Of another, the order is taken, and the losses are those after repair (:class:`fasp_fx.obs.OBS`).

    Args:
        consumers: those of the groups, with Gram matrices and, where a loss was given, gradients.
    """
    found = {}
    products = ObservedProducts(consumers.analysis, list(groups))
    for group in groups:
        if not group.uses and products.of(group):
            continue
        order = order_of(consumers, group, score, products, True, deepest_loss(group), consumers.weight)
        if not group.uses:  # nothing reads it
            order = Order(order.sets[:, : deepest_loss(group)], np.zeros(deepest_loss(group) + 1))
        found[group.name] = order if order.losses is not None else Order(order.sets, _losses(consumers, group, order))
    return found


def curves_of(orders: Mapping[str, Order]) -> dict[str, CostCurve]:
    """The cost curve of each group, from its order with losses."""
    return {name: CostCurve(order.losses) for name, order in orders.items() if order.losses is not None}


def _losses(consumers: Consumers, group: Group, order: Order) -> np.ndarray:
    """The losses after repair in an order that is given."""
    view, obs = consumers.view(group, order.sets.shape[1], consumers.weight), OBS()
    problems = [Elimination(columns, group.size, obs.curvature(columns), obs.damping) for columns in view.consumers]
    each = max(1, -(-group.width // obs.rounds))
    losses = [0.0]
    for start in range(0, order.sets.shape[1], each):
        going = order.sets[:, start : start + each]
        added = sum(problem.remove(going.reshape(-1)) for problem in problems)
        losses += (losses[-1] + added * np.arange(1, going.shape[1] + 1) / going.shape[1]).tolist()
    return np.array(losses)


__all__ = ["curves_of", "orders_of"]
