"""Find the items that make the difference: the largest part of them with which there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def largest_passing_subset(
    items: Sequence[T], fault: Callable[[list[T]], str | None]
) -> tuple[list[T], list[tuple[T, str]]]:
    """A part of ``items`` without fault that no other item can join, and what was seen when each of the
    others tried to.

    One faulty item among n costs about 2 log n trials.

    Args:
        fault: what is wrong with some of the items together, or ``None``.
    """
    left: list[tuple[T, str]] = []

    def join(base: list[T], candidates: Sequence[T]) -> list[T]:
        found = fault([*base, *candidates]) if candidates else None
        if found is None:
            return [*base, *candidates]
        if len(candidates) == 1:
            left.append((candidates[0], found))
            return base
        middle = len(candidates) // 2
        return join(join(base, candidates[:middle]), candidates[middle:])

    return join([], items), left


__all__ = ["largest_passing_subset"]
