"""How many channel sets each group of a model loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

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
    deepest_loss,
    is_excluded,
    lost_by_pattern,
    validate,
)
from fasp_fx.analysis import APPROXIMATE, Analysis, Group, Resource, Sparsity
from fasp_fx.calibration import ServedTrial
from fasp_fx.errors import NothingPrunableError

from ._calibrating import Method
from ._config import PruningConfig


def budget_for(
    config: PruningConfig, analysis: Analysis, count: Callable[[Cap | None], Resource] | None = None
) -> Budget:
    """How much of what was asked for may stay; without a limit where each pattern has its own sparsity.

    Args:
        count: counts a resource; ``None``: of the one program that was analysed.

    Raises:
        BudgetError: a resource cannot be counted.
    """
    count = count or partial(counted, analysis)
    if config.budgets:
        return Budget(analysis.chosen, [Limit.under(cap, count(cap)) for cap in config.budgets])
    sparsity = config.target_sparsity
    return Budget(analysis.chosen, [] if sparsity is None else [Limit(count(None), sparsity)])


def check_request(
    method: Method, budget: Budget, groups: Sequence[Group], costs: Costs | None = None
) -> None:
    """Validate a request before the costs are measured; arguments and errors as for :func:`allocate`."""
    part = _open(method, budget, groups)
    if isinstance(method.allocation, CostAllocation) and costs is None:
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
    part = _open(method, budget, groups)
    if isinstance(config.sparsity, Mapping):
        check_asked(config.sparsity, part.groups)
        return part.spread(lost_by_pattern(part, config.sparsity, config.round_to), budget), []
    if trial is not None:
        trial.serve(part.groups, part.spread, advance)
    if isinstance(allocation, CostAllocation):
        assert costs is not None
        given = (costs, trial) if isinstance(allocation, Search) else (costs,)
        found = validate(allocation(part, config.round_to, *given), part)
    else:
        found = validate(allocation(part, config.round_to), part)
    return part.spread(found, budget), list(trial.notes) if trial is not None else []


def expected_sparsity(config: PruningConfig, analysis: Analysis) -> float:
    """The sparsity that is asked for, or that something else comes to where all groups lose alike.

    Raises:
        FaspError: as for :func:`allocate`.
    """
    if config.target_sparsity is not None:
        return config.target_sparsity
    budget = budget_for(config, analysis)
    lost, _ = allocate(Method.of(replace(config, allocation="uniform")), budget, analysis.groups, None)
    return Sparsity(analysis).removed(budget.counts(lost))


def _open(method: Method, budget: Budget, groups: Sequence[Group]) -> Budget:
    """The budget of the groups that are not excluded."""
    exclude = method.config.exclude
    check_patterns("exclude", exclude, groups)
    part = budget.only([not is_excluded(group, exclude) for group in budget.groups])
    part.advice = _advice(method.config, groups)
    if not part.groups:
        reasons = "; ".join(sorted({group.reason for group in groups if group.reason}))
        why = "exclude= leaves all whole" if budget.groups else reasons or "it has no coupled weights"
        advice = f"; ask for {part.advice}" if part.advice else ""
        raise NothingPrunableError(f"no group of this model can be pruned: {why}{advice}")
    return part


def _advice(config: PruningConfig, groups: Sequence[Group]) -> str:
    """What would let more go, if anything: groups that a norm mixes stay unless they are asked for."""
    sizes = [
        group.size
        for group in groups
        if group.status == APPROXIMATE and group.granularity in config.granularity and deepest_loss(group)
        if APPROXIMATE not in config.include and not is_excluded(group, config.exclude)
    ]
    include = (*config.include, APPROXIMATE)
    return f"include={include}, for {sum(sizes):,} channel sets more" if sizes else ""


__all__ = ["allocate", "budget_for", "check_request", "expected_sparsity"]
