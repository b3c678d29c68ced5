"""Writes into tensors that forward has made are read as results, other writes are functionalised; what models
write into their inputs and buffers stays theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import made
from oracle import zeroed
from randomly import Between, hold, inputs, sets_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def written(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Twelve channels that a function writes into."""
    torch.manual_seed(0)
    first, last = nn.Linear(8, 12), nn.Linear(12, 3)
    return made(lambda self, x: self.last(function(self.first(x))), first=first, last=last).double()


def before_and_after(h: Tensor) -> Tensor:
    h = torch.sin(h)
    before = h.exp()
    h.mul_(2.0)
    return before + h


def twice(h: Tensor) -> Tensor:
    h = torch.sin(h)
    h += 1.0
    h *= h.abs()
    return h


def through_a_view(h: Tensor) -> Tensor:
    h = torch.sin(h)
    part = h[..., :4]
    h.mul_(3.0)
    return torch.cat([part, h[..., 4:]], -1)


def into_a_view(h: Tensor) -> Tensor:
    h = torch.sin(h)
    h[..., :4].mul_(3.0)
    return F.relu_(h.sinh().transpose(0, 1)).transpose(0, 1) + h


def into_parts_that_are_read(h: Tensor) -> Tensor:
    h = torch.sin(h)
    first, before = h[:, 0], h[:, 1:3].exp()
    h[:, 1:][:, :2] *= h[:, :1]
    first *= h[:, -1]
    h[:, -1] = first
    h[:, 1:3] = before
    return h + first.relu_()[:, None] * before.sum(1, keepdim=True)


def alias_by_name(h: Tensor) -> Tensor:
    h = torch.sin(h)
    torch.feature_dropout(input=h, p=0.5, train=False).add_(1.0)
    return torch.dropout(h, p=0.5, train=False) * 2


def another_type(h: Tensor) -> Tensor:
    return h * torch.ones(12, dtype=torch.float64).gt_(0.5)


ALL = (
    before_and_after,
    twice,
    through_a_view,
    into_a_view,
    into_parts_that_are_read,
    alias_by_name,
    another_type,
)


@pytest.mark.parametrize("function", ALL, ids=lambda function: function.__name__)
def test_the_program_computes_what_the_model_computes(function: Callable[[Tensor], Tensor]) -> None:
    model = written(function)
    captured = fasp_fx.capture(model, (X,)).program
    for x in (X, torch.randn(2, 7, 8, dtype=torch.float64)):
        (found,) = pytree.tree_leaves(captured.module(x))
        assert torch.allclose(found, model(x), rtol=1e-12, atol=1e-12)
    assert not any(
        node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        for node in captured.module.graph.nodes
    )
    result = fasp_fx.prune(model, (X,), score="magnitude", restore=None, sparsity=0.3)
    assert torch.allclose(result.module(X), zeroed(model, result.plan)(X), rtol=1e-12, atol=1e-12)


def test_operators_that_are_taken_apart_copy_where_no_view_can_be() -> None:
    """A cast that does nothing lies in memory as what it casts, where a trace makes a copy (XLNet)."""
    model = written(lambda h: h * torch.einsum("btc,cnd->btnd", h, torch.ones(12, 1, 12).to(h)).flatten(2))
    graph = fasp_fx.capture(model, (X,)).program.module.graph
    assert graph.find_nodes(op="call_function", target=torch.ops.aten.reshape.default)
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)


def test_the_callers_program_stays_as_it_is() -> None:
    exported = torch.export.export(written(twice), (X,), strict=False)
    before = str(exported.graph)
    fasp_fx.prune(exported, score="magnitude", restore=None, sparsity=0.3)
    assert str(exported.graph) == before


# --- Models that write into their inputs: what they compute of a batch does not depend on who ran it before,
# and the caller's tensors stay as they are.


def _shifted(in_place: bool) -> nn.Module:
    """Begins by moving its input, in its place or beside it, which is the same function."""
    layers = (nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 4))
    return made(
        lambda self, x: self.layers(x.sub_(self.shift).mul_(3.0) if in_place else (x - self.shift) * 3.0),
        layers=nn.Sequential(*layers),
        shift=torch.ones(()),
    )


def _pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    written, beside = _shifted(True), _shifted(False)
    beside.load_state_dict(written.state_dict())
    return written, beside


def _batches(count: int = 8, rows: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 6, generator=generator) for _ in range(count)]


OPTIONS: dict[str, dict[str, Any]] = {"best": {"quality": "best"}, "search": {"allocation": "search"}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_pruned_as_the_model_that_writes_nothing(options: dict[str, Any]) -> None:
    plans, weights = [], []
    for model in _pair():
        batches = _batches()
        result = fasp_fx.prune(model, (_batches()[0],), calibration=batches, sparsity=0.4, **options)
        assert all(map(torch.equal, batches, _batches())), "the caller's batches changed"
        plans.append(result.plan.groups)
        weights.append(dict(result.module.named_parameters()))
    assert plans[0] == plans[1]
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, msg=name)


# --- Whatever an operator reads and does not return is read all the same; what a graph writes is no constant.


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
