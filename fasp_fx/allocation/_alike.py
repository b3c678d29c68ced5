"""Groups of one shape that lose alike, for runtimes that take one width for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..analysis.groups import Group
from ._allocation import Budget
from .costs import CostCurve, Costs


class AlikeBudget(Budget):
    """A budget in which one group stands for all of its shape.

    Args:
        whole: the budget of all groups.
    """

    def __init__(self, whole: Budget) -> None:
        classes: dict[Any, list[int]] = {}
        for index, group in enumerate(whole.groups):
            classes.setdefault(_shape(group), []).append(index)
        self.whole, self.classes = whole, list(classes.values())
        super().__init__([whole.groups[alike[0]] for alike in self.classes], whole.limits)

    def spread(self, lost: Sequence[int]) -> list[int]:
        """What all groups lose, of what those lose that stand for them."""
        by_group = {index: count for alike, count in zip(self.classes, lost, strict=True) for index in alike}
        return [by_group[index] for index in range(len(self.whole.groups))]

    def counts(self, lost: Sequence[int]) -> list[int]:
        return self.whole.counts(self.spread(lost))

    def joined(self, costs: Costs, averages: bool = False) -> Costs:
        """The cost curves of all groups of a shape as one, by the name of the group that stands for them;
        none where one has none.

        Args:
            averages: whether that is their mean, as for numbers that are held against one threshold, or
                their sum, as for losses that are held against what all the groups take.
        """
        join = np.mean if averages else np.sum
        curves = {}
        for group, alike in zip(self.groups, self.classes, strict=True):
            names = [self.whole.groups[index].name for index in alike]
            if all(name in costs for name in names):
                least = min(len(costs[name].losses) for name in names)
                curves[group.name] = CostCurve(join([costs[name].losses[:least] for name in names], 0))
        return costs.with_curves(curves)


def _shape(group: Group) -> Any:
    """What groups of layers that are alike have in common."""
    members = [
        (member.dim, member.size, len(member.indices), member.block_dim, member.blocks)
        for member in (*group.producers, *group.consumers)
    ]
    return (
        group.width,
        group.blocks,
        group.needed,
        group.granularity,
        group.status,
        len(group.producers),
        tuple(members),
    )


__all__ = ["AlikeBudget"]
