from ._allocation import (
    Allocation as Allocation,  # an allocation maps a budget and round_to to the channel sets that each block of each of the budget's groups loses
    CostAllocation as CostAllocation,  # An allocation that wants to know what each group costs; the cost curves are measured before it is asked
    Global as Global,  # One threshold for all groups: channel sets go where a weight removed costs least
    Search as Search,  # An evolutionary search from what Global finds, judged by running the pruned model
    Trial as Trial,  # A way to find out what an allocation really costs
    uniform as uniform,  # Channel sets lost per block of each group: the same fraction of every group, found by bisection
)
from ._budgets import (
    KINDS as KINDS,  # every kind of budget that can be stored, by its name
    Bytes as Bytes,  # The bytes of all parameters, tied ones once, as the report's line bytes has them: with a format of GGUF files
    CacheBytes as CacheBytes,  # The bytes that the key-value cache takes per token of one sequence, as the report's line cache has them
    Cap as Cap,  # How much of one resource may stay
    Latency as Latency,  # The microseconds of whatever is to be fast, as a function of yours predicts them (examples/latency.py measures one)
    Macs as Macs,  # The multiply-accumulates of one forward pass on the example inputs: of linear, convolution and recurrent operators
    Parameters as Parameters,  # The number of all parameters, tied ones once, as the report's line parameters has them
    budget_data as budget_data,  # Budgets as the plain data that budget_from_data reads
    budget_from_data as budget_from_data,  # The budgets that budget_data wrote
    counted as counted,  # What a budget counts of a program; None: what sparsity is a fraction of
    macs_of as macs_of,  # Multiply-accumulates of one forward pass on the example inputs
    read_budget as read_budget,  # The budgets that an option was given: one or several
)
from ._costs import (
    CostCurve as CostCurve,  # What one group costs
    Costs as Costs,  # The cost curves of a model's groups by their names, measured once (fasp_fx.measure) for several prunings
    Point as Point,  # What would be left of a model, and what that would cost
    check_costs as check_costs,  # Refuse cost curves of another model, score or granularity
)
from ._limits import (
    Budget as Budget,  # How much of one or of several resources may stay, as an allocation sees it
    Limit as Limit,  # How much of one resource may stay
    check_asked as check_asked,  # Refuse to take from groups that stay whole
    check_counts as check_counts,  # How many channel sets each block of some groups loses, if it can
    check_patterns as check_patterns,  # Refuse patterns that name no group, nor a weight of any
    check_reach as check_reach,  # Refuse a budget that the groups cannot meet together
    is_excluded as is_excluded,  # Whether a pattern names a group, or a weight that it takes rows or columns from
    lost_by_pattern as lost_by_pattern,  # Channel sets lost per block of each group: the fraction of the first pattern that matches it
    lost_per_block as lost_per_block,  # The removal nearest to fraction of a block that leaves a multiple of round_to
    validate as validate,  # What an allocation returned, if it can be done
)

__all__ = [
    "Allocation",
    "Budget",
    "Bytes",
    "CacheBytes",
    "Cap",
    "CostAllocation",
    "CostCurve",
    "Costs",
    "Global",
    "Latency",
    "Macs",
    "Parameters",
    "Point",
    "Search",
    "Trial",
    "lost_per_block",
    "uniform",
]
