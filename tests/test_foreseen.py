"""What operators are foreseen to return of tensors without data is what torch finds by running them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fasp_fx.channels import foreseen
from torch import Tensor, nn
from torch.export import Dim, export

from fasp_fx.base.compat import FakeTensor, enable_python_dispatcher

ATEN = torch.ops.aten


class Sized(nn.Module):
    """Three tensors whose first two sizes vary, the last one of gaps."""

    def forward(self, x: Tensor, whole: Tensor, y: Tensor) -> Tensor:
        return x.sum() + whole.sum() + y.sum()


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    """Tensors without data: of symbolic sizes (``x``), of integers, laid otherwise in memory, and weights."""
    free = {0: Dim.AUTO, 1: Dim.AUTO}
    inputs = (torch.randn(3, 5, 8), torch.ones(3, 5, 8, dtype=torch.long), torch.randn(3, 8, 5).mT)
    program = export(Sized(), inputs, dynamic_shapes=(free, free, free))
    x, whole, laid = (node.meta["val"] for node in program.graph.nodes if node.op == "placeholder")
    assert isinstance(x, FakeTensor)
    weights = {
        "weight": torch.randn(12, 8),
        "narrow": torch.randn(12, 7),
        "double": torch.randn(12, 8).double(),
        "bias": torch.randn(12),
        "scale": torch.randn(8),
        "short": torch.randn(7),
    }
    made = {name: x.fake_mode.from_tensor(value, static_shapes=True) for name, value in weights.items()}
    return {"x": x, "whole": whole, "laid": laid, "mode": x.fake_mode, **made}


def _described(value: Tensor) -> tuple[Any, ...]:
    sizes = (*value.shape, *value.stride(), value.storage_offset())
    return (
        [size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes],
        value.dtype,
        value.device,
        value.requires_grad,
    )


KNOWN: dict[str, Any] = {
    "relu": lambda g: (ATEN.relu.default, (g["x"],), {}),
    "gelu": lambda g: (ATEN.gelu.default, (g["x"],), {"approximate": "tanh"}),
    "silu": lambda g: (ATEN.silu.default, (g["x"],), {}),
    "tanh": lambda g: (ATEN.tanh.default, (g["x"],), {}),
    "sigmoid": lambda g: (ATEN.sigmoid.default, (g["x"],), {}),
    "linear": lambda g: (ATEN.linear.default, (g["x"], g["weight"], g["bias"]), {}),
    "linear without bias": lambda g: (ATEN.linear.default, (g["x"], g["weight"]), {}),
    "addmm": lambda g: (ATEN.addmm.default, (g["bias"], g["x"].flatten(0, 1), g["weight"].t()), {}),
    "layer_norm": lambda g: (ATEN.layer_norm.default, (g["x"], [8], g["scale"], g["scale"], 1e-5), {}),
    "view": lambda g: (ATEN.view.default, (g["x"], [g["x"].shape[0], g["x"].shape[1], 2, 4]), {}),
    "reshape": lambda g: (ATEN.reshape.default, (g["x"], [g["x"].shape[0] * g["x"].shape[1], -1]), {}),
    "view of weights": lambda g: (ATEN.view.default, (g["weight"], [-1, 6]), {}),
}
#: what is left to torch, which refuses it or does more than shapes show
LEFT: dict[str, Any] = {
    "integers": lambda g: (ATEN.relu.default, (g["whole"],), {}),
    "gaps": lambda g: (ATEN.relu.default, (g["laid"],), {}),
    "another operator": lambda g: (ATEN.sin.default, (g["x"],), {}),
    "a weight too narrow": lambda g: (ATEN.linear.default, (g["x"], g["narrow"]), {}),
    "a weight of another type": lambda g: (ATEN.linear.default, (g["x"], g["double"]), {}),
    "a bias too long": lambda g: (ATEN.linear.default, (g["x"], g["weight"], g["scale"]), {}),
    "a product too narrow": lambda g: (
        ATEN.addmm.default,
        (g["bias"], g["x"].flatten(0, 1), g["narrow"].t()),
        {},
    ),
    "a product of another type": lambda g: (
        ATEN.addmm.default,
        (g["bias"], g["x"].flatten(0, 1), g["double"].t()),
        {},
    ),
    "a norm over other channels": lambda g: (ATEN.layer_norm.default, (g["x"], [7], g["short"]), {}),
    "a view of another size": lambda g: (ATEN.view.default, (g["x"], [g["x"].shape[0], 4, 8]), {}),
    "a view whose size is a symbol": lambda g: (ATEN.view.default, (g["x"], [g["x"].shape[0], -1]), {}),
    "a view that does not divide": lambda g: (ATEN.view.default, (g["weight"], [-1, 7]), {}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_it_is_what_torch_returns(name: str, given: dict[str, Any]) -> None:
    with torch.no_grad(), given["mode"], enable_python_dispatcher():
        target, args, kwargs = KNOWN[name](given)
        found, expected = foreseen(target, args, kwargs), target(*args, **kwargs)
    assert isinstance(found, FakeTensor)
    assert _described(found) == _described(expected)


@pytest.mark.parametrize("name", LEFT)
def test_the_rest_is_left_to_torch(name: str, given: dict[str, Any]) -> None:
    with torch.no_grad(), given["mode"]:
        target, args, kwargs = LEFT[name](given)
        assert foreseen(target, args, kwargs) is None


def test_nothing_is_foreseen_of_what_gradients_are_taken_of(given: dict[str, Any]) -> None:
    weight = given["mode"].from_tensor(nn.Parameter(torch.randn(12, 8)), static_shapes=True)
    with given["mode"], torch.enable_grad():
        assert foreseen(ATEN.linear.default, (given["x"], weight), {}) is None
    with given["mode"], torch.no_grad():
        assert foreseen(ATEN.linear.default, (given["x"], weight), {}) is not None
