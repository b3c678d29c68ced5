"""Operators executed while analysing: equal calls once, different ones never mistaken for one another; and
distinct numbers without sorting, against numpy.
"""

from __future__ import annotations

import numpy as np
import torch
from fasp_fx.channels import Execution, are_among, counted, distinct, ranked
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

aten = torch.ops.aten


def _weight(execution: Execution, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return execution.like(torch.empty(shape, dtype=dtype))


def test_layers_that_are_alike_are_executed_once():
    execution = Execution()
    x = _weight(execution, 2, 8)
    for _ in range(3):
        x = execution.call(aten.linear.default, (x, _weight(execution, 8, 8)), {})
        hidden = execution.call(aten.gelu.default, (x,), {"approximate": "none"})
    again = execution.call(aten.linear.default, (_weight(execution, 2, 8), _weight(execution, 8, 8)), {})
    assert again is x
    assert hidden is x, "a tensor of this layout is one object"
    assert len(execution._known) == 2


def test_what_differs_only_in_an_argument_is_another_call():
    execution = Execution()
    x = _weight(execution, 2, 3, 4)
    shapes = {
        tuple(execution.call(aten.sum.dim_IntList, (x, dims), {"keepdim": keep}).shape)
        for dims in ([0], [1], [0, 1])
        for keep in (False, True)
    }
    assert shapes == {(3, 4), (1, 3, 4), (2, 4), (2, 1, 4), (4,), (1, 1, 4)}
    kinds = [
        execution.call(aten.add.Scalar, (_weight(execution, 2, dtype=torch.int64), number), {}).dtype
        for number in (1, 1.0, True)
    ]
    assert kinds == [torch.int64, torch.float32, torch.int64]


def test_what_an_operator_does_to_its_argument_does_not_reach_the_others():
    execution = Execution()
    x, same = _weight(execution, 2, 3), _weight(execution, 2, 3)
    assert x is same
    assert execution.call(aten.t_.default, (x,), {}).shape == (3, 2)
    assert same.shape == (2, 3)


def test_layouts_differ_by_strides_and_types():
    execution = Execution()
    assert execution.like(torch.empty(4, 4)) is not execution.like(torch.empty(4, 4).t())
    assert execution.like(torch.empty(4, 4)) is not execution.like(torch.empty(4, 4, dtype=torch.float64))
    assert execution.like(torch.empty(3, 2).t()).stride() == (1, 2)


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
