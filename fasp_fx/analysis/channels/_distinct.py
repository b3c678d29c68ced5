"""The distinct ones of many whole numbers, without sorting where that can be: channel numbers and sets lie in
order mostly, and in small ranges.
"""

from __future__ import annotations

import numpy as np

#: how many times as long as the numbers a table over their range may be
_SPARSE = 8


def distinct(numbers: np.ndarray) -> np.ndarray:
    """The distinct numbers in order, as ``np.unique`` gives them; the same array where it is that."""
    if _increase(numbers):
        return numbers
    low, span = _range(numbers)
    if span < _SPARSE * numbers.size:
        return np.flatnonzero(marked(span, numbers - low)) + low
    ordered = np.sort(numbers)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])]


def counted(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct numbers in order, and how often each is there, as ``np.unique(..., return_counts=True)``
    gives them.
    """
    if _increase(numbers):
        return numbers, np.ones(len(numbers), dtype=np.int64)
    low, span = _range(numbers)
    if span < _SPARSE * numbers.size:
        times = np.bincount(numbers - low)
        found = np.flatnonzero(times)
        return found + low, times[found]
    return np.unique(numbers, return_counts=True)


def ranked(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct numbers in order, and for each number its place among these, as ``np.unique(...,
    return_inverse=True)`` gives them.
    """
    if _increase(numbers):
        return numbers, np.arange(len(numbers))
    low, span = _range(numbers)
    if span >= _SPARSE * numbers.size:
        found, places = np.unique(numbers, return_inverse=True)
        return found, places.reshape(-1)
    present = marked(span, numbers - low)
    return np.flatnonzero(present) + low, (np.cumsum(present) - 1)[numbers - low]


def are_among(numbers: np.ndarray, others: np.ndarray) -> bool:
    """Whether each of some numbers is one of the others."""
    if not numbers.size or not others.size or numbers.dtype.kind != "i":
        return bool(np.isin(numbers, others).all())
    low, span = _range(others)
    if int(numbers.min()) < low or int(numbers.max()) >= low + span:
        return False
    if span >= _SPARSE * (numbers.size + others.size):
        return bool(np.isin(numbers, others).all())
    return bool(marked(span, others - low)[numbers - low].all())


def _increase(numbers: np.ndarray) -> bool:
    return bool((numbers[1:] > numbers[:-1]).all())


def _range(numbers: np.ndarray) -> tuple[int, int]:
    """The lowest of some numbers, and how many there are from it up to the highest."""
    low = int(numbers.min())
    return low, int(numbers.max()) - low + 1


def marked(count: int, *numbers: np.ndarray) -> np.ndarray:
    """Whether each of the numbers below ``count`` is among some: a table in the place of a search."""
    table = np.zeros(count, dtype=bool)
    for some in numbers:
        table[some] = True
    return table


__all__ = ["are_among", "counted", "distinct", "marked", "ranked"]
