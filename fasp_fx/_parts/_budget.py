"""The budgets of several parts of a model as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..allocation import Budget
from ._names import group_within


class JoinedBudget(Budget):
    """The budgets of several parts as one: sparsity is the fraction removed of all their counted weights.

    Args:
        budgets: those of the parts, by their paths; groups go by the names that they have in the whole model.
    """

    def __init__(self, budgets: Mapping[str, Budget]) -> None:
        groups = [group_within(path, group) for path, budget in budgets.items() for group in budget.groups]
        super().__init__(groups, sum(budget.total for budget in budgets.values()))
        self.budgets = list(budgets.values())

    def split(self, lost: Sequence[int]) -> list[list[int]]:
        """One list for the groups of each part."""
        found, start = [], 0
        for budget in self.budgets:
            found.append(list(lost[start : start + len(budget.groups)]))
            start += len(budget.groups)
        return found

    def sparsity(self, lost: Sequence[int]) -> float:
        return self.average([budget.sparsity(own) for budget, own in zip(self.budgets, self.split(lost), strict=True)])

    def average(self, sparsities: list[float]) -> float:
        """The sparsity of the whole, from those of the parts."""
        return sum(budget.total * own for budget, own in zip(self.budgets, sparsities, strict=True)) / max(self.total, 1)


__all__ = ["JoinedBudget"]
