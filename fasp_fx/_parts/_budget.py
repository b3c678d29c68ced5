"""The budgets of several parts of a model as one."""

from __future__ import annotations

from ..allocation import Budget


class JoinedBudget(Budget):
    """The budgets of several parts as one: sparsity is the fraction removed of all their counted weights."""

    def __init__(self, budgets: list[Budget]) -> None:
        self.budgets = budgets
        self.groups = [group for budget in budgets for group in budget.groups]
        self.total = sum(budget.total for budget in budgets)

    def split(self, lost: list[int]) -> list[list[int]]:
        """One list for the groups of each part."""
        found, start = [], 0
        for budget in self.budgets:
            found.append(lost[start : start + len(budget.groups)])
            start += len(budget.groups)
        return found

    def sparsity(self, lost: list[int]) -> float:
        return self.average([budget.sparsity(own) for budget, own in zip(self.budgets, self.split(lost), strict=True)])

    def average(self, sparsities: list[float]) -> float:
        """The sparsity of the whole, from those of the parts."""
        return sum(budget.total * own for budget, own in zip(self.budgets, sparsities, strict=True)) / max(self.total, 1)


__all__ = ["JoinedBudget"]
