"""The distinct ones of many whole numbers, without sorting where that can be: channel numbers and sets lie in
order mostly, and in small ranges.
"""

from __future__ import annotations

import numpy as np

#: how many times as long as the numbers a table over their range may be
_SPARSE = 8


def distinct(numbers: np.ndarray) -> np.ndarray:
    """The distinct numbers in order, as ``np.unique`` gives them; the same array where it is that."""
    return numbers if _increase(numbers) else np.unique(numbers)


def counted(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct numbers in order, and how often each is there, as ``np.unique(..., return_counts=True)``
    gives them.
    """
    if _increase(numbers):
        return numbers, np.ones(len(numbers), dtype=np.int64)
    return np.unique(numbers, return_counts=True)


def _increase(numbers: np.ndarray) -> bool:
    return bool((numbers[1:] > numbers[:-1]).all())


def ranked(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct numbers in order, and for each number its place among these, as ``np.unique(...,
    return_inverse=True)`` gives them.
    """
    if not numbers.size:
        return numbers, np.zeros(0, dtype=np.int64)
    low, high = int(numbers.min()), int(numbers.max())
    if high - low >= _SPARSE * numbers.size:
        found, places = np.unique(numbers, return_inverse=True)
        return found, places.reshape(-1)
    present = np.zeros(high - low + 1, dtype=bool)
    present[numbers - low] = True
    return np.flatnonzero(present) + low, (np.cumsum(present) - 1)[numbers - low]


__all__ = ["counted", "distinct", "ranked"]
