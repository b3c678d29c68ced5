"""Operators executed while analysing: equal calls once, different ones never mistaken for one another."""

import torch
from fasp_fx.channels import Execution
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
