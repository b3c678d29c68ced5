from ._allocation import (
    Allocation as Allocation,  # an allocation maps a budget and round_to to the channel sets that each block of each of the budget's groups loses
)
from ._allocation import (
    CostAllocation as CostAllocation,  # An allocation that wants to know what each group costs; the cost curves are measured before it is asked
)
from ._allocation import (
    Global as Global,  # One threshold for all groups: channel sets go where a weight removed costs least
)
from ._allocation import (
    Search as Search,  # An evolutionary search from what Global finds, judged by running the pruned model
)
from ._allocation import (
    Trial as Trial,  # A way to find out what an allocation really costs
)
from ._allocation import (
    uniform as uniform,  # Channel sets lost per block of each group: the same fraction of every group, found by bisection
)
from ._budgets import (
    KINDS as KINDS,  # every kind of budget that can be stored, by its name
)
from ._budgets import (
    Bytes as Bytes,  # The bytes of all parameters, tied ones once, as the report's line bytes has them: with a format of GGUF files
)
from ._budgets import (
    CacheBytes as CacheBytes,  # The bytes that the key-value cache takes per token of one sequence, as the report's line cache has them
)
from ._budgets import (
    Cap as Cap,  # How much of one resource may stay
)
from ._budgets import (
    Latency as Latency,  # The microseconds of whatever is to be fast, as a function of yours predicts them (examples/latency.py measures one)
)
from ._budgets import (
    Macs as Macs,  # The multiply-accumulates of one forward pass on the example inputs: of linear, convolution and recurrent operators
)
from ._budgets import (
    Microseconds as Microseconds,  # The microseconds that a function of the widths predicts
)
from ._budgets import (
    Parameters as Parameters,  # The number of all parameters, tied ones once, as the report's line parameters has them
)
from ._budgets import (
    budget_data as budget_data,  # Budgets as the plain data that budget_from_data reads
)
from ._budgets import (
    budget_from_data as budget_from_data,  # The budgets that budget_data wrote
)
from ._budgets import (
    counted as counted,  # What a budget counts of a program; None: what sparsity is a fraction of
)
from ._budgets import (
    macs_of as macs_of,  # Multiply-accumulates of one forward pass on the example inputs
)
from ._budgets import (
    read_budget as read_budget,  # The budgets that an option was given: one or several
)
from ._costs import (
    CostCurve as CostCurve,  # What one group costs
)
from ._costs import (
    Costs as Costs,  # The cost curves of a model's groups by their names, measured once (fasp_fx.measure) for several prunings
)
from ._costs import (
    check_costs as check_costs,  # Refuse cost curves of another model, score or granularity
)
from ._limits import (
    Budget as Budget,  # How much of one or of several resources may stay, as an allocation sees it
)
from ._limits import (
    Limit as Limit,  # How much of one resource may stay
)
from ._limits import (
    check_asked as check_asked,  # Refuse to take from groups that stay whole
)
from ._limits import (
    check_counts as check_counts,  # How many channel sets each block of some groups loses, if it can
)
from ._limits import (
    check_patterns as check_patterns,  # Refuse patterns that name no group, nor a weight of any
)
from ._limits import (
    check_reach as check_reach,  # Refuse a budget that the groups cannot meet together
)
from ._limits import (
    is_excluded as is_excluded,  # Whether a pattern names a group, or a weight that it takes rows or columns from
)
from ._limits import (
    lost_by_pattern as lost_by_pattern,  # Channel sets lost per block of each group: the fraction of the first pattern that matches it
)
from ._limits import (
    lost_per_block as lost_per_block,  # The removal nearest to fraction of a block that leaves a multiple of round_to
)
from ._limits import (
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
    "Search",
    "Trial",
    "lost_per_block",
    "uniform",
]
