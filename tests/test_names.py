"""Names that a model has given already: to arguments and nodes as to weights, and to submodules as to the
parts that a fused weight is split into.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx
from fasp_fx.testing import check_program

pytestmark = pytest.mark.usefixtures("no_files", "shared_captures")


class Image(nn.Module):
    """An argument, a parameter and a node all want one name."""

    def __init__(self, argument: str, parameter: str) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(12, 3, 3, 3) * 0.3)
        self.register_parameter(parameter, nn.Parameter(torch.randn(4, 12, 3, 3) * 0.3))
        self.second = parameter
        self.argument = argument

    def run(self, x: Tensor) -> Tensor:
        return F.conv2d(F.relu(F.conv2d(x, self.first)), getattr(self, self.second))


class CalledX(Image):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class CalledWeight(Image):
    def forward(self, weight: Tensor) -> Tensor:
        return self.run(weight)


IMAGE = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    "model",
    [CalledX("x", "x"), CalledWeight("weight", "weight"), CalledX("x", "conv2d"), CalledX("x", "self")],
    ids=lambda m: m.second,
)
def test_an_argument_or_node_called_like_a_parameter(model: Image) -> None:
    check_program(model.eval(), (IMAGE,), invariants=("mask-exact", "nothing", "signature", "steps"))
    exported = torch.export.export(model, (IMAGE,))
    if model.second != "self":  # torch itself cannot run an exported program with such a parameter
        assert fasp_fx.analyze(exported).select("prunable")


def test_an_input_called_like_a_parameter_is_named_by_the_call() -> None:
    result = fasp_fx.prune(CalledX("x", "x").eval(), (IMAGE,), score="magnitude", restore=None)
    result.module(x=IMAGE)
    with pytest.raises(fasp_fx.CallError, match="argument 'x': dimension 2 is 9"):
        result.module(torch.randn(2, 3, 9, 9))


class Fused(nn.Module):
    """Queries, keys and values of one weight, head by head; something else has the name of one of
    the parts.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.qkv, self.out, self.kind = nn.Linear(16, 48), nn.Linear(16, 16), kind
        if kind in ("submodule", "unused"):
            self.qkv.add_module("weight_0", nn.Linear(16, 16))
        if kind == "parameter":
            self.qkv.register_parameter("weight_1", nn.Parameter(torch.randn(16)))
        if kind == "buffer":
            self.qkv.register_buffer("bias_2", torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "submodule":
            x = self.qkv.weight_0(x)
        if self.kind == "parameter":
            x = x + self.qkv.weight_1
        if self.kind == "buffer":
            x = x + self.qkv.bias_2
        q, k, v = self.qkv(x).view(*x.shape[:2], 4, 3, 4).permute(3, 0, 2, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Packed(nn.Module):
    """One weight of which ranges are taken apart, and a submodule that has the name of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.w_0, self.out = (
            nn.Parameter(torch.randn(48, 16) * 0.3),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
        )

    def forward(self, x: Tensor) -> Tensor:
        of_q, of_kv = self.w.split([16, 32])
        q = F.linear(self.w_0(x), of_q).view(*x.shape[:2], 4, 4).transpose(1, 2)
        k, v = F.linear(x, of_kv).view(*x.shape[:2], 2, 4, 4).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize(
    "model",
    [*map(Fused, ("submodule", "unused", "parameter", "buffer")), Packed()],
    ids=lambda m: getattr(m, "kind", "packed"),
)
def test_parts_of_a_split_weight_take_names_that_are_free(model: nn.Module) -> None:
    x = torch.randn(2, 5, 16)
    plan = fasp_fx.prune(model.eval(), (x,), score="magnitude", restore=None, sparsity=0.1).plan
    names = {name for name, _ in model.named_modules()} | model.state_dict().keys()
    assert plan.splits
    assert not names & {part.name for part in plan.splits}
    check_program(model, (x,), invariants=("mask-exact", "plan", "steps"), sparsity=0.1)


class Taken(nn.Module):
    """A submodule or buffer whose name is an attribute of every graph module."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        self.up, self.down, self.called = nn.Linear(6, 24), nn.Linear(24, 6), name
        if kind == "buffer":
            self.register_buffer(name, torch.randn(6))
        else:
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        held = getattr(self, self.called)
        return self.down(F.relu(self.up(held(x) if isinstance(held, nn.Module) else x + held)))


@pytest.mark.parametrize("name", ["graph", "code", "meta"])
@pytest.mark.parametrize("kind", ["buffer", "submodule"])
def test_names_that_a_graph_cannot_hold_are_refused(name: str, kind: str) -> None:
    with pytest.raises(fasp_fx.CaptureError, match=f"the model holds '{name}.*rename '{name}'"):
        fasp_fx.analyze(Taken(name, kind).eval(), (torch.randn(3, 6),))
