"""What operators make is recorded by shapes alone as torch records it; sizes that do not fit are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import made
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

from fasp_fx.capturing import by_shapes
from fasp_fx.capturing._shapes import _FAKES

ATEN = torch.ops.aten
#: what is laid out in several ways in memory: [any, 3, 5, 4]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "in order": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "half": Tensor.half,
    "double": Tensor.double,
}
WEIGHT = torch.rand(6, 4)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        operator.name(): lambda x, call=operator: call(x, *_more(call, x))  # type: ignore[misc]
        for operator in _FAKES
    },
    "linear": lambda x: F.linear(x, WEIGHT.to(x), WEIGHT[:, 0].to(x)),
    "linear with a vector": lambda x: F.linear(x, WEIGHT[0].to(x)),
    "matmul": lambda x: x @ x.mT,
    "matmul with a matrix": lambda x: x @ WEIGHT.T.to(x),
    "matmul of other batches": lambda x: x @ x[:1].mT,
    "layer norm": lambda x: F.layer_norm(x, (5, 4)),
    "batch norm": lambda x: F.batch_norm(x, *torch.ones(2, 3).to(x)),
    "dropout": lambda x: F.dropout(x, 0.1, False),
    "softmax": lambda x: F.softmax(x, 1),
    "softmax in another type": lambda x: F.softmax(x, -1, dtype=torch.float64),
}


def _more(call: Any, x: Tensor) -> tuple[Any, ...]:
    more: dict[Any, tuple[Any, ...]] = {
        ATEN.pow.Tensor_Scalar: (2,),
        ATEN._safe_softmax.default: (-1,),
        ATEN.grid_sampler_2d.default: (x.new_zeros(x.shape[0], 6, 2, 2), 0, 0, False),
    }
    return more.get(call, ())


def recorded(call: Callable[[Tensor], Tensor], layout: Callable[[Tensor], Tensor]) -> list[tuple[Any, ...]]:
    """What is recorded of each node."""
    program = export(
        made(lambda m, x: call(layout(x + 0))),
        (torch.rand(7, 3, 5, 4),),
        dynamic_shapes=((Dim.AUTO, *[Dim.STATIC] * 3),),
    )
    nodes: list[fx.Node] = program.graph.find_nodes(op="placeholder") + [
        node for node in program.graph.nodes if node.op == "call_function"
    ]
    values = [(str(node.target), node.meta["val"]) for node in nodes if isinstance(node.meta["val"], Tensor)]
    return [
        (target, str(tuple(value.shape)), str(value.stride()), value.dtype, value.device)
        for target, value in values
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_recorded_by_shapes_is_what_is_traced(call: str, layout: str) -> None:
    if call.endswith("_") and layout == "expanded":
        pytest.skip("nothing is written into what lies in several places")
    expected = recorded(CALLS[call], LAYOUTS[layout])
    with by_shapes():
        assert recorded(CALLS[call], LAYOUTS[layout]) == expected


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.linear(x, torch.rand(2, 3)),
        lambda x: x @ x,
        lambda x: F.layer_norm(x, (3,)),
        lambda x: F.batch_norm(x, torch.ones(2), torch.ones(2)),
        lambda x: F.grid_sample(x, torch.rand(2, 6, 2, 2)),
    ],
)
def test_sizes_that_do_not_fit_are_refused(call: Callable[[Tensor], Tensor]) -> None:
    with by_shapes(), pytest.raises(RuntimeError, match="meet"):
        recorded(call, LAYOUTS["in order"])


@pytest.mark.parametrize("call", CALLS)
def test_values_are_computed_with_and_no_steps_are_written_down(call: str) -> None:
    """An exporter that takes an operator apart writes down what it is made of, not how its shape is found."""
    x = torch.rand(2, 3, 5, 4)
    expected = CALLS[call](x.clone())
    with by_shapes(), enable_python_dispatcher():
        torch.testing.assert_close(CALLS[call](x.clone()), expected)
        trace = make_fx(
            lambda x: CALLS[call](x), tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True
        )
        steps = trace(x.clone()).graph.nodes
    assert [str(node.target) for node in steps if "empty" in str(node.target)] == []
