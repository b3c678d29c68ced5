"""How much of resources may stay, as an allocation sees it, and of which groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np

from fasp_fx.analysis import Group, Resource
from fasp_fx.errors import ArgumentError, BudgetError, SparsityError

from ._budgets import Cap
from ._costs import CostCurve, Costs


@dataclass(frozen=True)
class Limit:
    """How much of one resource may stay.

    Attributes:
        resource: what is counted.
        need: the fraction of what the dense model has that has to go.
        cap: what was asked for, more than which never stays; ``None``: the fraction that goes is to be met as
            nearly as whole channel sets can.
    """

    resource: Resource
    need: float
    cap: Cap | None = None

    @classmethod
    def under(cls, cap: Cap, resource: Resource) -> Limit:
        """No more than a budget allows."""
        whole = resource.whole
        return cls(resource, 1 - cap.allowed(whole) / whole if whole else 0.0, cap)

    def over(self, lost: Sequence[int]) -> float:
        """By how much too much stays, as a fraction of what the dense model has; ``lost`` as for
        :meth:`fasp_fx.analysis.Resource.used`.
        """
        return self.need - self.resource.removed(lost)


class Budget:
    """How much of one or of several resources may stay, as an allocation sees it.

    In all methods, ``lost[i]`` are the channel sets that each block of group ``i`` loses.

    Args:
        groups: the groups that can lose channel sets.
        limits: for each resource, how much of it may stay; all over the same groups.
        whole, places: of a budget that stands for another of more groups, that one, and which of the groups
            here each of its groups loses as much as; ``None``: it loses nothing.

    Attributes:
        advice: what would let more go than all groups here can lose, in words.

    Examples:
        >>> def half(budget, round_to):  # an allocation of one's own
        ...     return budget.closest([[group.width // 2 for group in budget.groups]])
        >>> fasp_fx.prune(captured, calibration=batches, allocation=half).report.parameters
        (884, 316)
    """

    advice = ""

    def __init__(
        self,
        groups: Sequence[Group],
        limits: Sequence[Limit],
        whole: Budget | None = None,
        places: Sequence[int | None] = (),
    ) -> None:
        self.groups, self.limits = list(groups), tuple(limits)
        self._whole, self._places = whole, places

    def narrowed(self, places: Sequence[int | None]) -> Budget:
        """This budget for fewer groups: each of its groups loses what the one at its place loses, or nothing
        where it has none. The first group at a place stands for it, in multiples of what any there keeps.
        """
        at: dict[int, Group] = {}
        for group, place in zip(self.groups, places, strict=True):
            if place is not None and at.setdefault(place, group) is not group:
                at[place] = replace(at[place], multiple=math.lcm(at[place].multiple, group.multiple))
        return Budget([at[place] for place in sorted(at)], self.limits, self, places)

    def only(self, taking_part: Sequence[bool]) -> Budget:
        """This budget for some of its groups, of which nothing goes of the others."""
        place = itertools.count()
        return self.narrowed([next(place) if takes else None for takes in taking_part])

    def spread(self, lost: Sequence[int], whole: Budget | None = None) -> list[int]:
        """What the groups lose of a budget that this one was narrowed from (``None``: of the first)."""
        if self is whole or self._whole is None:
            return list(lost)
        return self._whole.spread([0 if place is None else lost[place] for place in self._places], whole)

    def joined(self, costs: Costs) -> Costs:
        """The cost curves of the groups here: of one that stands for several, the sums of theirs, and none
        where one of them has none.

        Args:
            costs: of the groups of the first budget that this one was narrowed from.
        """
        if self._whole is None:
            return costs
        costs, names = self._whole.joined(costs), dict[int, list[str]]()
        for group, place in zip(self._whole.groups, self._places, strict=True):
            if place is not None:
                names.setdefault(place, []).append(group.name)
        curves = {}
        for tied in names.values():
            if all(name in costs for name in tied):
                least = min(len(costs[name].losses) for name in tied)
                curves[tied[0]] = CostCurve(np.sum([costs[name].losses[:least] for name in tied], 0))
        return Costs(curves, costs.fingerprint, costs.score, costs.granularity)

    def counts(self, lost: Sequence[int]) -> list[int]:
        """Channel sets that the groups of the limits lose, in all their blocks together."""
        if self._whole is not None:
            return self._whole.counts(self.spread(lost, self._whole))
        return [count * group.blocks for count, group in zip(lost, self.groups, strict=True)]

    def over(self, lost: Sequence[int]) -> float:
        """The largest relative excess over any of the limits, as a fraction of what the dense model has;
        negative where enough goes.
        """
        counts = self.counts(lost)
        excess = [limit.over(counts) for limit in self.limits]
        if any(map(math.isnan, excess)):
            raise ArgumentError(
                f"a resource's used() gives no number where the groups lose {counts} channel sets; it must"
                " say how much is left for every loss within reach"
            )
        return max(excess)

    def removed(self, lost: Sequence[int]) -> list[float]:
        """The fraction of each resource that goes."""
        return [limit.resource.removed(self.counts(lost)) for limit in self.limits]

    def effects(self, lost: Sequence[int]) -> np.ndarray:
        """The fraction of each resource that one more channel set of each block of a group takes, ``[groups,
        resources]``.
        """
        effects = np.zeros((len(self.groups), len(self.limits)))
        for index, group in enumerate(self.groups):
            step = -1 if lost[index] >= group.deepest_loss and lost[index] else 1
            effects[index] = self.removed([*lost[:index], lost[index] + step, *lost[index + 1 :]])
        return np.abs(effects - np.array(self.removed(lost)))

    @property
    def is_ceiling(self) -> bool:
        """Whether too much may never stay; else the nearest is wanted."""
        return any(limit.cap is not None for limit in self.limits)

    def closest(self, candidates: Iterable[list[int]]) -> list[int]:
        """The candidate that meets the budget best: the nearest; with ceilings, of those under all of them,
        if there are any.
        """
        measured = [(self.over(lost), lost) for lost in candidates]
        if self.is_ceiling:
            under = [pair for pair in measured if pair[0] <= 0]
            measured = under or [min(measured, key=lambda pair: pair[0])]
        return min(measured, key=lambda pair: abs(pair[0]))[1]


def validate(lost: Iterable[int], budget: Budget) -> list[int]:
    """What an allocation returned, if it can be done.

    Raises:
        ArgumentError: see :func:`check_counts`.
        BudgetError: it leaves more than a budget allows.
    """
    counts = check_counts(lost, budget.groups)
    if budget.is_ceiling and (over := budget.over(counts)) > 0:
        raise BudgetError(
            f"the allocation leaves {over:.2%} of the dense model's more than the budget allows; it must"
            " bring budget.over(…) to 0"
        )
    return counts


def check_counts(lost: Iterable[int], groups: Sequence[Group]) -> list[int]:
    """How many channel sets each block of some groups loses, if it can.

    Raises:
        ArgumentError: not one whole number for each group, or one that leaves less than the group needs.
    """
    counts = list(lost) if isinstance(lost, Iterable) else [lost]
    if len(counts) != len(groups):
        raise ArgumentError(
            f"the allocation returned {len(counts)} numbers for {len(groups)} groups; it must return one for"
            " each"
        )
    for group, sets in zip(groups, counts, strict=True):
        if not isinstance(sets, (int, np.integer)) or not 0 <= sets <= group.deepest_loss:
            raise ArgumentError(
                f"the allocation takes {sets!r:.80} channel sets from a block of '{group.name}'; give a whole"
                f" number from 0 to {group.deepest_loss} for each group"
            )
    return [int(sets) for sets in counts]


def lost_per_block(width: int, fraction: float, round_to: int, needed: int = 1) -> int:
    """The removal nearest to ``fraction`` of a block that leaves a multiple of ``round_to``, and at least as
    many as are needed.

    Examples:
        >>> from fasp_fx.allocation import lost_per_block
        >>> lost_per_block(100, 0.3, round_to=16)  # 64 stay
        36
    """
    least = -(-needed // round_to) * round_to
    kept = round(width * (1 - fraction) / round_to) * round_to
    return width - min(max(kept, least), width)


def check_reach(budget: Budget, round_to: int | None) -> None:
    """Refuse a budget that the groups cannot meet together.

    Raises:
        SparsityError: the message says which sparsity is in reach.
        BudgetError: likewise how much stays at least; or the dense model meets the budget.
    """
    deepest = budget.counts([group.most_lost(round_to) for group in budget.groups])
    rounds = any(group.step(round_to) > 1 for group in budget.groups)
    multiples = "the usual round_to" if round_to is None else f"round_to={round_to}"
    rounded, smaller = (f" with {multiples}", ", or for round_to=1") if rounds else ("", "")
    for limit in (one for one in budget.limits if one.over(deepest) > (1e-12 if one.cap is None else 0)):
        advice = f", or ask for {budget.advice}" if budget.advice else ""
        where = (
            f"{rounded}; let more stay{smaller}{advice}, or see analyze(...).groups for what is frozen and"
            " why"
        )
        if limit.cap is None:
            reach = np.floor(limit.resource.removed(deepest) * 1e4) / 1e4
            raise SparsityError(
                f"sparsity={limit.need:.4g} is out of reach: the prunable groups allow at most"
                f" {reach:.4f}{where}"
            )
        least, whole = limit.resource.used(deepest), max(limit.resource.whole, 1)
        raise BudgetError(
            f"{limit.cap} is out of reach: at least {least:,} of {whole:,} {limit.cap.unit} stay, a share of"
            f" {np.ceil(least / whole * 1e4) / 1e4:.4f}{where}"
        )
    if budget.is_ceiling and budget.over([0] * len(budget.groups)) <= 0:
        has = ", ".join(f"{limit.resource.whole:,} {limit.cap.unit}" for limit in budget.limits if limit.cap)
        raise BudgetError(f"the model meets the budget as it is: it has {has}; allow less")


def names_any(pattern: str, names: Iterable[str]) -> bool:
    """Whether a pattern names a weight, a module that holds it, or a group."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in names)


def read_by(group: Group) -> list[str]:
    """The names that a group can be given a sparsity by: its own, and all those of the weights that lose
    columns with it; of those that lose rows where none does.
    """
    return [group.name, *(name for member in group.consumers or group.producers for name in member.names)]


def is_excluded(group: Group, patterns: Iterable[str]) -> bool:
    """Whether a pattern names a group, or a weight that it takes rows or columns from."""
    return any(names_any(pattern, [group.name, *group.names]) for pattern in patterns)


def check_patterns(option: str, patterns: Iterable[str], groups: Sequence[Group]) -> None:
    """Refuse patterns that name no group, nor a weight of any.

    Args:
        option: what the patterns were given as.
        groups: all groups of a model, those that cannot be pruned among them.

    Raises:
        ArgumentError: names the pattern.
    """
    for pattern in patterns:
        if not any(is_excluded(group, [pattern]) for group in groups):
            raise ArgumentError(
                f"{option}: '{pattern}' matches no group, and no weight of a coupled group; give a whole name"
                f" or wildcards ('*{pattern}*'): analyze(...).groups has their names"
            )


def check_asked(fractions: Mapping[str, float], open_to: Sequence[Group]) -> None:
    """Refuse to take from groups that stay whole.

    Args:
        fractions: what goes, by pattern.
        open_to: the groups that can be pruned and are not excluded.

    Raises:
        ArgumentError: a pattern names none of them.
    """
    for pattern, fraction in fractions.items():
        if not any(names_any(pattern, read_by(group)) for group in open_to):
            raise ArgumentError(
                f"sparsity asks for {fraction} of '{pattern}', which matches no group that can be pruned and"
                " is not excluded, and no weight that loses columns with one; analyze(...).groups has their"
                " names"
            )


def lost_by_pattern(budget: Budget, fractions: Mapping[str, float], round_to: int | None) -> list[int]:
    """Channel sets lost per block of each group: the fraction of the first pattern that matches it, nothing
    if none does.
    """
    lost = []
    for group in budget.groups:
        asked = (each for pattern, each in fractions.items() if names_any(pattern, read_by(group)))
        fraction = next(asked, 0.0)
        count = lost_per_block(group.width, fraction, group.step(round_to), group.needed)
        lost.append(count if fraction else 0)
    return lost
