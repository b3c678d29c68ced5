"""Whatever an operator reads and does not return is read all the same; what a graph writes is no constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import made
from randomly import Between, hold, inputs, sets_of
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

LIBRARY = torch.library.Library("fasp_fx_read", "DEF")


def _define(schema: str, real: Callable[..., object], fake: Callable[..., object]) -> None:
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, real, "CPU")
    torch.library.register_fake(f"fasp_fx_read::{name}", fake, lib=LIBRARY)


def _fill(into: Tensor, values: Tensor) -> None:
    into.copy_(values.cumsum(-1))


_define(
    "pair(Tensor x) -> (int, Tensor)",
    lambda x: (x.shape[-1], x * torch.arange(x.shape[-1])),
    lambda x: (x.shape[-1], torch.empty_like(x)),
)
_define("fill_(Tensor(a!) into, Tensor values) -> ()", _fill, lambda into, values: None)
_define(
    "several(Tensor x) -> (Tensor[], Tensor)",
    lambda x: ([x * 2, x.flip(-1)], x * 3),
    lambda x: ([torch.empty_like(x), torch.empty_like(x)], torch.empty_like(x)),
)
_define("width(Tensor x) -> int", lambda x: x.shape[-1], lambda x: x.shape[-1])


def _filled(h: Tensor) -> Tensor:
    made = torch.zeros_like(h)
    torch.ops.fasp_fx_read.fill_(made, h)
    return made


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "a number and a tensor": lambda h: torch.ops.fasp_fx_read.pair(h)[1],
    "nothing, written into an argument": _filled,
    "a list of tensors and a tensor": (
        lambda h: torch.ops.fasp_fx_read.several(h)[0][1] + torch.ops.fasp_fx_read.several(h)[1]
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_operators_of_any_return_freeze_what_they_are_given(name: str) -> None:
    analysis = hold(Between(UNKNOWN[name]), inputs())
    assert sets_of(analysis, "first.weight") == [("frozen", 12, 1)]
    assert ("prunable", 16, 1) in sets_of(analysis, "third.weight")


def test_a_width_that_the_exporter_writes_out_is_that_of_the_dense_model() -> None:
    hold(Between(lambda h: h / torch.ops.fasp_fx_read.width(h)), inputs())


def test_a_number_of_channels_read_in_the_graph_keeps_them() -> None:
    """The exporter writes a fixed width out; in a graph that somebody else has written, it can be read."""
    exported = torch.export.export(Between(lambda h: h / 12).eval(), (torch.randn(2, 6, 8),))
    (division,) = exported.graph.find_nodes(op="call_function", target=torch.ops.aten.div.Tensor)
    with exported.graph.inserting_before(division):
        count = exported.graph.call_function(torch.ops.aten.sym_size.int, (division.args[0], 2))
        count.meta["val"] = 12
    division.args = (division.args[0], count)
    assert sets_of(fasp_fx.analyze(exported), "first.weight") == [("frozen", 12, 1)]


@pytest.mark.parametrize("beside", [False, True])
def test_a_written_buffer_is_no_constant(beside: bool) -> None:
    """Channels in an order that changes with every call."""

    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x))
        moved = hidden[..., self.order]
        self.order.copy_(self.order.roll(1))
        return self.last(F.relu(self.second(hidden + moved if beside else moved)))

    layers = {"first": nn.Linear(8, 12), "second": nn.Linear(12, 5), "last": nn.Linear(5, 4)}
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    analysis = hold(made(forward, **layers, order=order), inputs(), times=2)
    assert ("frozen", 12, 1) in sets_of(analysis, "first.weight")
