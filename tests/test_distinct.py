"""Distinct numbers without sorting, against numpy."""

from __future__ import annotations

import numpy as np
from fasp_fx.channels import are_among, counted, distinct, ranked
from hypothesis import given
from hypothesis import strategies as st

NUMBERS = st.lists(st.integers(-1, 40) | st.integers(10**6, 10**12), max_size=30)


@given(NUMBERS | NUMBERS.map(lambda numbers: sorted(set(numbers))))
def test_as_numpy_finds_them(numbers: list[int]) -> None:
    array = np.array(numbers, dtype=np.int64)
    expected, places = np.unique(array, return_inverse=True)
    np.testing.assert_array_equal(distinct(array), expected)
    expected, times = np.unique(array, return_counts=True)
    for found, own in zip(counted(array), (expected, times), strict=True):
        np.testing.assert_array_equal(found, own)
    found, ranks = ranked(array)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(ranks, places)
    np.testing.assert_array_equal(array, numbers)


@given(NUMBERS, NUMBERS)
def test_whether_all_are_among_others(numbers: list[int], others: list[int]) -> None:
    for kept in (numbers, [*others, *others[:3]]):
        held, among = (np.array(side, dtype=np.int64) for side in (kept, others))
        assert are_among(held, among) == bool(np.isin(held, among).all())
