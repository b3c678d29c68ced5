"""The oracle itself, against models masked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import made
from torch import nn
from torch.nn import functional as F

from fasp_fx.analysis import ParameterSlice, PlannedGroup, PruningPlan
from fasp_fx.testing import Masked
from fasp_fx.testing.oracle import error, kept


def plan(*consumers: ParameterSlice) -> PruningPlan:
    return PruningPlan("", (PlannedGroup("group", 4, 1, 1, (), consumers),), 0.0)


def test_columns_of_a_consumer_are_zero_and_the_model_is_untouched() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(4, 3)
    before = [parameter.clone() for parameter in model.parameters()]
    masked = Masked(model, plan(ParameterSlice("2.weight", 1, (0, 3))))
    hidden = torch.tanh(model[0](x)) * torch.tensor([0.0, 1, 1, 0, 1])
    assert error(masked(x), model[2](hidden)) < 1e-6
    assert error(masked(x), model(x)) > 1e-2
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))


def test_a_lookup_finds_the_whole_weight() -> None:
    """Embedding and head share a weight, whose columns the head consumes."""
    torch.manual_seed(0)
    model: Any = made(
        lambda self, tokens: self.head((found := self.embed(tokens)).tanh()) + found.sum(-1, keepdim=True),
        embed=nn.Embedding(7, 4),
        head=nn.Linear(4, 7, bias=False),
    )
    weight = model.head.weight = model.embed.weight
    tokens = torch.arange(6).reshape(2, 3)
    masked = Masked(model, plan(ParameterSlice("embed.weight", 1, (1,))))
    embedded = F.embedding(tokens, weight)
    expected = F.linear(torch.tanh(embedded) * torch.tensor([1.0, 0, 1, 1]), weight) + embedded.sum(
        -1, keepdim=True
    )
    assert error(masked(tokens), expected) < 1e-6
    exported = torch.export.export(model, (tokens,), strict=False)
    assert error(Masked(exported, plan(ParameterSlice("embed.weight", 1, (1,))))(tokens), expected) < 1e-6


def test_blocks_lose_their_own_positions() -> None:
    weight = torch.ones(2, 3, 4)
    mask = kept(weight, ParameterSlice("experts", 1, ((0,), (2,)), 0))  # type: ignore[arg-type]
    assert mask[0, :, 0].tolist() == [False, True, True]
    assert mask[1, :, 0].tolist() == [True, True, False]
    rows = kept(torch.ones(4, 2), ParameterSlice("grouped", 1, ((0,), (1,)), 0))  # type: ignore[arg-type]
    assert rows.tolist() == [[False, True], [False, True], [True, False], [True, False]]


A, INF = torch.tensor([1.0, 2.0]), float("inf")
#: pairs of outputs, and how far they are apart
APART: list[tuple[Any, Any, float]] = [
    (A, A, 0),
    (A, torch.tensor([1.0, 4.0]), 0.5),
    (A, A[:1], INF),
    (torch.tensor([1.0, float("nan")]), A, INF),
    (torch.tensor([1.0, INF]), torch.tensor([1.0, INF]), 0),
    (torch.tensor([1.0, -INF]), torch.tensor([1.0, INF]), INF),
    ({"a": A, "n": torch.tensor(1)}, {"a": A, "n": torch.tensor(2)}, INF),
    ({"a": A, "n": torch.tensor(2)}, {"a": A, "n": torch.tensor(2)}, 0),
    (torch.tensor([1 + 1j]), torch.tensor([1 + 2j]), 0.5),
]


@pytest.mark.parametrize(("first", "second", "apart"), APART)
def test_errors(first: Any, second: Any, apart: float) -> None:
    assert error(first, second) == apart
