"""Find the faulty among many by trying some of them together."""

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
    faulty: list[tuple[T, str]] = []

    def join(base: list[T], candidates: Sequence[T]) -> list[T]:
        problem = fault([*base, *candidates]) if candidates else None
        if problem is None:
            return [*base, *candidates]
        if len(candidates) == 1:
            faulty.append((candidates[0], problem))
            return base
        middle = len(candidates) // 2
        return join(join(base, candidates[:middle]), candidates[middle:])

    return join([], items), faulty
