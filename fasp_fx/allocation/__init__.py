"""How much goes of each coupled group: budgets, cost curves, and the allocations that meet them."""

from ._allocation import Allocation, CostAllocation, Global, Search, Trial, uniform
from ._limits import Budget, Limit, check_reach, deepest_loss, lost_per_block, validate

__all__ = [
    "Allocation",
    "Budget",
    "CostAllocation",
    "Global",
    "Limit",
    "Search",
    "Trial",
    "check_reach",
    "deepest_loss",
    "lost_per_block",
    "uniform",
    "validate",
]
