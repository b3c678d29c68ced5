"""Writes into tensors that forward has made are read as results; other writes are functionalised, and all
models compute what they did.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from models import made
from oracle import zeroed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fasp_fx
from fasp_fx.capturing import _functional

pytestmark = pytest.mark.usefixtures("shared_captures")

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def written(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Twelve channels that a function writes into."""
    torch.manual_seed(0)
    first, last = nn.Linear(8, 12), nn.Linear(12, 3)
    return made(lambda self, x: self.last(function(self.first(x))), first=first, last=last).double()


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the graph was traced again")

    monkeypatch.setattr(_functional, "_decompositions", refuse)


def both_names(h: Tensor) -> Tensor:
    h = torch.sin(h)
    again = h.add_(1.0)
    return again * h


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
    return h


def alias_without_a_word(h: Tensor) -> Tensor:
    h = torch.sin(h)
    same = F.dropout(h, 0.5, training=False)
    same.add_(1.0)
    return h * 2


def alias_by_name(h: Tensor) -> Tensor:
    h = torch.sin(h)
    torch.feature_dropout(input=h, p=0.5, train=False).add_(1.0)
    return torch.dropout(h, p=0.5, train=False) * 2


def detached(h: Tensor) -> Tensor:
    return torch.sin(h).detach_() + h


def another_type(h: Tensor) -> Tensor:
    return h * torch.ones(12, dtype=torch.float64).gt_(0.5)


SIMPLE = (both_names, before_and_after, twice)
ALL = (*SIMPLE, through_a_view, into_a_view, alias_without_a_word, alias_by_name, detached, another_type)


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


@pytest.mark.parametrize("function", SIMPLE, ids=lambda function: function.__name__)
def test_simple_writes_are_not_traced_again(function: Callable[[Tensor], Tensor], traced_once: None) -> None:
    fasp_fx.capture(written(function), (X,))


@pytest.mark.parametrize("sizes", [(3, 4), (-1, 2, 3)], ids=str)
def test_a_dimension_that_is_unflattened_is_a_view(sizes: tuple[int, ...], traced_once: None) -> None:
    def turned(h: Tensor) -> Tensor:
        parts = h.unflatten(dim=-1, sizes=sizes)
        return torch.tanh(parts).flip(-1).flatten(2)

    model = written(turned)
    captured = fasp_fx.capture(model, (X,)).program
    (view,) = captured.module.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)
    assert view.args[1][2:] == [12 // math.prod(sizes[1:]), *sizes[1:]]
    for x in (X, torch.randn(2, 7, 8, dtype=torch.float64)):
        (found,) = pytree.tree_leaves(captured.module(x))
        assert torch.equal(found, model(x))


def test_the_callers_program_stays_as_it_is() -> None:
    exported = torch.export.export(written(twice), (X,), strict=False)
    before = str(exported.graph)
    fasp_fx.prune(exported, score="magnitude", restore=None, sparsity=0.3)
    assert str(exported.graph) == before
