"""How many channel sets each group of a model loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..allocation._allocation import CostAllocation, TrialAllocation
from ..allocation._limits import (
    Budget,
    Ceiling,
    Target,
    alike,
    check_asked,
    check_patterns,
    held_by,
    is_excluded,
    joined,
    lost_by_pattern,
    read_by,
    validate,
)
from ..allocation.budgets import Cap
from ..allocation.costs import Costs
from ..analysis._analysis import Analysis
from ..analysis.groups import Group
from ..analysis.resources import Resource, Sparsity
from ..base._undisturbed import in_turns
from ..calibration._trial import ServedTrial
from ..errors import NothingPrunableError
from ._method import Method
from .config import PruningConfig


def counted(analysis: Analysis, cap: Cap | None) -> Resource:
    """What a budget counts of a program; ``None``: what sparsity is a fraction of."""
    return Sparsity(analysis) if cap is None else cap.resource(analysis)


def budget_for(
    config: PruningConfig, groups: Sequence[Group], count: Callable[[Cap | None], Resource]
) -> Budget:
    """How much of what was asked for may stay; without a limit where each pattern has its own sparsity.

    Raises:
        BudgetError: a resource cannot be counted.
    """
    if config.budgets:
        return Budget(groups, [Ceiling(cap, count(cap)) for cap in config.budgets])
    sparsity = config.target_sparsity
    return Budget(groups, [] if sparsity is None else [Target(count(None), sparsity)])


def check_request(
    method: Method, budget: Budget, groups: Sequence[Group], costs: Costs | None = None
) -> None:
    """Validate a request before the costs are measured; arguments and errors as for :func:`allocate`."""
    check_patterns("exclude", method.config.exclude, groups, held_by)
    part = _included(method, budget)
    if isinstance(method.allocation, CostAllocation) and budget.groups and costs is None:
        method.allocation.check(part, method.config.round_to)
    else:
        allocate(method, budget, groups, costs)


def allocate(
    method: Method,
    budget: Budget,
    groups: Sequence[Group],
    costs: Costs | None,
    trial: ServedTrial | None = None,
    advance: Callable[[float], None] = lambda fraction: None,
) -> tuple[list[int], list[str]]:
    """How many channel sets each block of each of the budget's groups loses, and what there is to say of it.

    Args:
        groups: all groups of the model, those that cannot be pruned among them.
        costs: the cost curves, where the allocation wants them.
        trial: runs the model as it would be pruned, where the allocation wants that.
        advance: called with the fraction of a search done.

    Raises:
        NothingPrunableError: no group can be pruned.
        ArgumentError: a name pattern matches nothing, or the allocation returned what cannot be done.
        SparsityError, BudgetError: the sparsity or a budget is out of reach.
    """
    config, allocation = method.config, method.allocation
    check_patterns("exclude", config.exclude, groups, held_by)
    if not budget.groups:
        reasons = sorted({group.reason for group in groups if group.reason})
        raise NothingPrunableError(
            "no group of this model can be pruned: "
            + ("; ".join(reasons) if reasons else "it has no coupled weights")
        )
    if isinstance(config.sparsity, Mapping):
        check_patterns("sparsity", config.sparsity, groups, read_by)
        check_asked(config.sparsity, config.exclude, groups, budget.groups)
    kept = part = _included(method, budget)
    if config.uniform_layers:
        places = alike(part.groups)
        kept = part.narrowed(places)
        averages = isinstance(allocation, CostAllocation) and allocation.averages
        costs = None if costs is None else joined(costs, part.groups, places, averages)
    if isinstance(config.sparsity, Mapping):
        return kept.spread(lost_by_pattern(kept, config.sparsity, config.round_to), budget), []
    if trial is not None:
        trial.serve(kept.groups, kept.spread, in_turns(advance))
    if isinstance(allocation, CostAllocation):
        assert costs is not None
        given = (costs, trial) if isinstance(allocation, TrialAllocation) else (costs,)
        found = validate(allocation(kept, config.round_to, *given), kept)
    else:
        found = validate(allocation(kept, config.round_to), kept)
    return kept.spread(found, budget), list(trial.notes) if trial is not None else []


def expected_sparsity(config: PruningConfig, analysis: Analysis) -> float:
    """The sparsity that is asked for, or that a budget comes to where all groups lose alike.

    Raises:
        FaspError: as for :func:`allocate`.
    """
    if (asked := config.target_sparsity) is not None and not config.budgets:
        return asked
    budget = budget_for(config, analysis.chosen, lambda cap: counted(analysis, cap))
    alike = Method.of(replace(config, allocation="uniform"))
    lost, _ = allocate(alike, budget, analysis.groups, None)
    return Sparsity(analysis).removed(budget.counts(lost))


def _included(method: Method, budget: Budget) -> Budget:
    """The budget of the groups that are not excluded."""
    if not method.config.exclude or not budget.groups:
        return budget
    excluded = [is_excluded(group, method.config.exclude) for group in budget.groups]
    if all(excluded):
        raise NothingPrunableError("every group that can be pruned is excluded; leave out some of exclude=")
    return budget.only([not out for out in excluded])


__all__ = ["allocate", "budget_for", "check_request", "counted", "expected_sparsity"]
