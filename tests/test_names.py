"""Names that a model has given already: to arguments and nodes as to weights, and to submodules as to the
parts that a fused weight is split into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import made, parameter, wide
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx
from fasp_fx.testing import check_program

pytestmark = pytest.mark.usefixtures("no_files")

IMAGE = torch.randn(2, 3, 8, 8)


def image(argument: str, name: str) -> nn.Module:
    """An argument, a parameter and a node all want one name."""

    def run(self: Any, x: Tensor) -> Tensor:
        return F.conv2d(F.relu(F.conv2d(x, self.first)), getattr(self, name))

    def called_weight(this: Any, weight: Tensor) -> Tensor:
        return run(this, weight)

    forward = run if argument == "x" else called_weight
    return made(forward, **{"first": parameter(12, 3, 3, 3, scale=0.3), name: parameter(4, 12, 3, 3)})


@pytest.mark.parametrize("names", [("x", "x"), ("weight", "weight"), ("x", "conv2d"), ("x", "self")], ids=str)
def test_an_argument_or_node_called_like_a_parameter(names: tuple[str, str]) -> None:
    model = image(*names)
    check_program(model, (IMAGE,), invariants=("mask-exact", "signature"))
    if "self" not in names:  # torch itself cannot run an exported program with such a parameter
        assert fasp_fx.analyze(torch.export.export(model, (IMAGE,))).select("prunable")


def fused(name: str, taken: Any, before: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """Queries, keys and values of one weight, head by head; something else has the name of one of
    the parts.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        x = before(self.qkv, x)
        parts = self.qkv(x).view(*x.shape[:2], 4, 3, 4).permute(3, 0, 2, 1, 4)
        return self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(x.shape))

    model: Any = made(forward, qkv=nn.Linear(16, 48), out=nn.Linear(16, 16))
    if type(taken) is Tensor:
        model.qkv.register_buffer(name, taken)
    else:
        setattr(model.qkv, name, taken)
    return model.eval()  # type: ignore[no-any-return]


SPLIT: dict[str, Callable[[], nn.Module]] = {
    "submodule": lambda: fused("weight_0", nn.Linear(16, 16), lambda qkv, x: qkv.weight_0(x)),
    "unused": lambda: fused("weight_0", nn.Linear(16, 16), lambda qkv, x: x),
    "parameter": lambda: fused("weight_1", parameter(16), lambda qkv, x: x + qkv.weight_1),
    "buffer": lambda: fused("bias_2", torch.randn(16), lambda qkv, x: x + qkv.bias_2),
}


@pytest.mark.parametrize("name", SPLIT)
def test_parts_of_a_split_weight_take_names_that_are_free(name: str) -> None:
    model, x = SPLIT[name](), torch.randn(2, 5, 16)
    plan = fasp_fx.prune(model, (x,), score="magnitude", restore=None, sparsity=0.1).plan
    names = {own for own, _ in model.named_modules()} | model.state_dict().keys()
    assert plan.splits
    assert not names & {part.name for part in plan.splits}
    check_program(model, (x,), invariants=("mask-exact",), sparsity=0.1)


@pytest.mark.parametrize("name", ["graph", "code", "meta", "_graph", "range_constraints"])
@pytest.mark.parametrize("kind", ["buffer", "submodule"])
def test_names_that_a_graph_cannot_hold_are_refused(name: str, kind: str) -> None:
    """Those that are attributes of every graph module."""

    def forward(self: Any, x: Tensor) -> Tensor:
        held = (self._modules if kind == "submodule" else self._buffers)[name]
        return self.down(F.relu(self.up(held(x) if kind == "submodule" else x + held)))

    model = wide(forward)
    if kind == "submodule":
        model.add_module(name, nn.Linear(6, 6))
    else:
        model.register_buffer(name, torch.randn(6))
    model.eval()
    with pytest.raises(fasp_fx.CaptureError, match=f"the model holds '{name}.*rename '{name}'"):
        fasp_fx.analyze(model, (torch.randn(3, 6),))
