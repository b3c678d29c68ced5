"""How many channel sets each group of a model loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from fasp_fx.allocation import (
    Budget,
    Cap,
    CostAllocation,
    Costs,
    Limit,
    Search,
    check_asked,
    check_patterns,
    counted,
    is_excluded,
    lost_by_pattern,
    validate,
)
from fasp_fx.analysis import APPROXIMATE, Analysis, Group, Groups, Resource, Sparsity
from fasp_fx.calibration import BudgetTrial
from fasp_fx.errors import NothingPrunableError, SparsityError

from ._config import PruningConfig
from ._method import Method


@dataclass(frozen=True)
class Step:
    """Which numbers of channel sets of a group are possible.

    Attributes:
        multiple: as many stay of each block as are a multiple of it.
        at_once: whether all of them go or none.
    """

    multiple: int = 1
    at_once: bool = False


class Constraint(Protocol):
    """Which counts belong together, and which are possible, as a format of files says it.

    Attributes:
        source: what says it, in words.
    """

    source: str

    def __call__(self, groups: Sequence[Group]) -> tuple[list[int | None], list[Step]]:
        """For each group that can lose channel sets its tie, a number that it shares with those that lose as
        much as it does, ``None`` where it stays whole; and its steps, of which those of the first group of a
        tie count.

        Raises:
            NothingPrunableError: all groups stay whole.
        """


def constrained(budget: Budget, constraint: Constraint | None) -> Budget:
    """The budget for one group for all that are tied, in steps that are possible; errors as for
    :class:`Constraint`.
    """
    if constraint is None:
        return budget
    ties, steps = constraint(budget.groups)
    narrowed, by_name = budget.narrowed(ties), dict(zip([group.name for group in budget.groups], steps))
    narrowed.groups = [
        replace(
            group,
            at_once=by_name[group.name].at_once,
            multiple=math.lcm(group.multiple, by_name[group.name].multiple),
        )
        for group in narrowed.groups
    ]
    return narrowed


def open_budget(config: PruningConfig, analysis: Groups, count: Callable[[Cap | None], Resource]) -> Budget:
    """How much of what was asked for may stay, as a budget of the groups that can be pruned and are not
    excluded; without a limit where each pattern has its own sparsity.

    Args:
        count: counts a resource, or what sparsity is a fraction of.

    Raises:
        BudgetError: a resource cannot be counted.
        ArgumentError: a name pattern matches nothing.
        NothingPrunableError: no group can be pruned.
    """
    limits = [Limit.under(cap, count(cap)) for cap in config.budgets]
    if not limits and config.target_sparsity is not None:
        limits = [Limit(count(None), config.target_sparsity)]
    groups, chosen = analysis.groups, analysis.chosen
    check_patterns("exclude", config.exclude, groups)
    budget = Budget(chosen, limits).only([not is_excluded(group, config.exclude) for group in chosen])
    budget.advice = _advice(config, groups)
    if not budget.groups:
        reasons = "; ".join(sorted({group.reason for group in groups if group.reason}))
        why = "exclude= leaves all whole" if chosen else reasons or "it has no coupled weights"
        advice = f"; ask for {budget.advice}" if budget.advice else ""
        raise NothingPrunableError(f"no group of this model can be pruned: {why}{advice}")
    return budget


def check_request(
    method: Method, budget: Budget, costs: Costs | None = None, constraint: Constraint | None = None
) -> None:
    """Validate a request before the costs are measured; arguments and errors as for :func:`allocate`."""
    if isinstance(method.allocation, CostAllocation) and costs is None:
        method.allocation.check(budget, method.config.round_to)
    else:
        allocate(method, budget, costs, constraint=constraint)


def allocate(
    method: Method,
    budget: Budget,
    costs: Costs | None = None,
    trial: BudgetTrial | None = None,
    constraint: Constraint | None = None,
) -> list[int]:
    """How many channel sets each block of each chosen group of the model loses.

    Args:
        costs: the cost curves, where the allocation wants them.
        trial: runs the model as it would be pruned, where the allocation wants that.
        constraint: what the budget was constrained by.

    Raises:
        ArgumentError: a name pattern matches nothing, or the allocation returned what cannot be done.
        SparsityError, BudgetError: the sparsity or a budget is out of reach, or less than a step.
    """
    config, allocation = method.config, method.allocation
    if isinstance(config.sparsity, Mapping):
        check_asked(config.sparsity, budget.groups)
        lost = lost_by_pattern(budget, config.sparsity, config.round_to)
    elif not isinstance(allocation, CostAllocation):
        lost = validate(allocation(budget, config.round_to), budget)
    else:
        assert costs is not None
        more = (trial,) if isinstance(allocation, Search) else ()
        lost = validate(allocation(budget, config.round_to, budget.joined(costs), *more), budget)
    if constraint is not None and not any(lost):
        raise SparsityError(
            f"the sparsity is less than half a step of what {constraint.source} can say; ask for more"
        )
    return budget.spread(lost)


def expected_sparsity(config: PruningConfig, analysis: Analysis) -> float:
    """The sparsity that is asked for, or that something else comes to where all groups lose alike.

    Raises:
        FaspError: as for :func:`open_budget` and :func:`allocate`.
    """
    if config.target_sparsity is not None:
        return config.target_sparsity
    uniform = Method.of(replace(config, allocation="uniform"))
    lost = allocate(uniform, open_budget(config, analysis, partial(counted, analysis)))
    counts = [count * group.blocks for count, group in zip(lost, analysis.chosen, strict=True)]
    return Sparsity(analysis).removed(counts)


def _advice(config: PruningConfig, groups: Sequence[Group]) -> str:
    """What would let more go, if anything: groups that a norm mixes stay unless they are asked for."""
    sizes = [
        group.size
        for group in groups
        if group.status == APPROXIMATE and group.granularity in config.granularity and group.deepest_loss
        if APPROXIMATE not in config.include and not is_excluded(group, config.exclude)
    ]
    include = (*config.include, APPROXIMATE)
    return f"include={include}, for {sum(sizes):,} channel sets more" if sizes else ""
