"""Cost curves of a program's groups, from what was seen of the dense model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..allocation import deepest_loss
from ..costs import CostCurve
from ..groups import Group
from ..scoring import Columns, GroupColumns, GroupScore, Order
from ..statistics import InputGradients
from ._consumers import Consumers
from ._order import order_of
from ._products import ObservedProducts


def curves_of(consumers: Consumers, groups: Sequence[Group], score: GroupScore) -> dict[str, CostCurve]:
    """The cost curve of each group; those whose channels no weight reads have none.

    A score that predicts losses gives its own. Of another, the order is taken, and each column costs ``½ G_jj Q_jj``, what it costs by itself where nothing is
    repaired: the diagonal of what :class:`fasp_fx.obs.OBS` minds, which takes no product of matrices. Repair makes all columns cheaper; how groups compare
    is much the same.

    Args:
        consumers: those of the groups, with Gram matrices or their diagonals and, where a loss was given, gradients.
    """
    found = {}
    products = ObservedProducts(consumers.analysis, list(groups))
    for group in groups:
        if not group.uses:
            if not products.of(group):  # nothing reads it
                found[group.name] = CostCurve(np.zeros(deepest_loss(group) + 1))
            continue
        order = order_of(consumers, group, score, products, True, deepest_loss(group), consumers.weight)
        losses = order.losses if order.losses is not None else _losses(consumers.view(group, order.sets.shape[1], consumers.weight), order)
        found[group.name] = CostCurve(losses)
    return found


def _losses(group: GroupColumns, order: Order) -> np.ndarray:
    """The losses in an order that is given, channel set by channel set."""
    costs = np.zeros(len(group.block_of))
    for columns in group.consumers:
        own = _column_costs(columns)
        for sets in columns.sets.T:
            np.add.at(costs, sets[sets >= 0], own[sets >= 0])
    return np.concatenate([[0.0], np.cumsum(costs[order.sets].sum(0))])


def _column_costs(columns: Columns) -> np.ndarray:
    """``½ G_jj Q_jj`` of each column, shape ``[columns]``."""
    assert columns.norms is not None
    squares = columns.norms.square()
    own = columns.weight.abs().to(squares.dtype).square().sum(0)
    gradients = columns.seen.get("gradients")
    if not isinstance(gradients, InputGradients) or not gradients.tokens:  # by the relative squared error of the output
        energy = float((own * squares).sum())
        return (0.5 * own * squares / (energy if energy > 0 else 1.0)).cpu().numpy()
    curvature = gradients.mean_squares()
    return (0.5 * squares * (own * gradients.mean_square() if curvature is None else curvature.to(squares))).cpu().numpy()


__all__ = ["curves_of"]
