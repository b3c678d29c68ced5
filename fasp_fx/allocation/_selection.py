"""Groups by the names of their weights: which stay whole, and which lose a fraction of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from ..analysis.groups import Group
from ..errors import ArgumentError
from ._limits import Budget, lost_per_block


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a weight, a module that holds it, or a group."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def held_by(group: Group) -> list[str]:
    """The names that a group can be excluded by: its own, and all those of the weights that it takes rows or
    columns from.
    """
    return [group.name, *(name for member in (*group.producers, *group.consumers) for name in member.names)]


def read_by(group: Group) -> list[str]:
    """The names that a group can be given a sparsity by: its own, and all those of the weights that lose
    columns with it; of those that lose rows where none does.
    """
    return [group.name, *(name for member in group.consumers or group.producers for name in member.names)]


def is_excluded(group: Group, patterns: Iterable[str]) -> bool:
    """Whether a pattern names a group, or a weight that it takes rows or columns from."""
    return any(matches(pattern, name) for pattern in patterns for name in held_by(group))


def check_patterns(
    option: str, patterns: Iterable[str], groups: Sequence[Group], names_of: Callable[[Group], list[str]]
) -> None:
    """Refuse patterns that name no group, nor a weight of any.

    Args:
        option: what the patterns were given as.
        groups: all groups of a model, those that cannot be pruned among them.
        names_of: the names of a group that count.

    Raises:
        ArgumentError: names the pattern.
    """
    for pattern in patterns:
        if not any(matches(pattern, name) for group in groups for name in names_of(group)):
            what = "that loses columns with a group" if names_of is read_by else "of a coupled group"
            raise ArgumentError(
                f"{option}: '{pattern}' matches no group, and no weight {what}; analyze(...).groups has their"
                " names"
            )


def check_asked(
    fractions: Mapping[str, float],
    exclude: Iterable[str],
    groups: Sequence[Group],
    chosen: Sequence[Group],
) -> None:
    """Refuse to take from groups that stay whole.

    Args:
        fractions: what goes, by pattern.
        exclude: patterns of what stays.
        groups: all groups of a model.
        chosen: those of them that can be pruned as asked.

    Raises:
        ArgumentError: a pattern asks for groups none of which is among those chosen, or all are excluded.
    """
    names = {group.name for group in chosen}
    excluded = {group.name for group in groups if is_excluded(group, exclude)}
    for pattern in fractions:
        asked = [group for group in groups if any(matches(pattern, name) for name in read_by(group))]
        can_go = [group for group in asked if group.name in names]
        if asked and not can_go:
            first = asked[0]
            raise ArgumentError(
                f"sparsity asks for {fractions[pattern]} of '{pattern}', which stays whole ('{first.name}' is"
                f" {first.status} at the granularity '{first.granularity}'"
                f"{first.reason and f': {first.reason}'}); leave it out"
            )
        if can_go and all(group.name in excluded for group in can_go):
            raise ArgumentError(
                f"sparsity asks for {fractions[pattern]} of '{pattern}', which exclude= leaves whole"
                f" ({can_go[0].name!r}); leave one of the two out"
            )


def lost_by_pattern(budget: Budget, fractions: Mapping[str, float], round_to: int) -> list[int]:
    """Channel sets lost per block of each group: the fraction of the first pattern that matches it, nothing
    if none does.
    """

    def fraction_of(group: Group) -> float:
        return next(
            (
                fraction
                for pattern, fraction in fractions.items()
                if any(matches(pattern, name) for name in read_by(group))
            ),
            0.0,
        )

    fractions_of = [(group, fraction_of(group)) for group in budget.groups]
    return [
        lost_per_block(group.width, fraction, group.step(round_to), group.needed) if fraction else 0
        for group, fraction in fractions_of
    ]


__all__ = [
    "check_asked",
    "check_patterns",
    "held_by",
    "lost_by_pattern",
    "matches",
    "read_by",
]
