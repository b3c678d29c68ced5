"""How much goes of each coupled group: budgets, cost curves, and the allocations that meet them."""

from __future__ import annotations

from ._allocation import (
    Allocation,
    Budget,
    Ceiling,
    CostAllocation,
    Global,
    Limit,
    Search,
    Target,
    Trial,
    TrialAllocation,
    check_reach,
    deepest_loss,
    lost_per_block,
    uniform,
    validate,
)

__all__ = [
    "Allocation",
    "Budget",
    "Ceiling",
    "CostAllocation",
    "Global",
    "Limit",
    "Search",
    "Target",
    "Trial",
    "TrialAllocation",
    "check_reach",
    "deepest_loss",
    "lost_per_block",
    "uniform",
    "validate",
]
