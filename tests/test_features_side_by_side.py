"""Inputs joined side by side: where one ends decides which weights meet the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import made
from oracle import assert_exact
from torch import Tensor, nn
from torch.export import Dim

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")


def joined() -> nn.Module:
    """A projected input between two others."""
    return made(
        lambda m, before, x, after: m.out(torch.cat([before, m.middle(x), after], dim=-1)),
        middle=nn.Linear(4, 6),
        out=nn.Sequential(nn.Linear(14, 8), nn.ReLU(), nn.Linear(8, 2)),
    )


ARGS = (torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4))


def test_their_widths_are_fixed_and_what_lies_between_is_pruned() -> None:
    torch.manual_seed(0)
    model = joined()
    result = fasp_fx.prune(model, ARGS, sparsity=0.4, score="random", restore=None)
    assert {part.name for group in result.plan.groups for part in group.producers} == {
        "middle.weight",
        "middle.bias",
        "out.0.weight",
        "out.0.bias",
    }
    assert_exact(model, result, ARGS, tuple(torch.randn(5, 4) for _ in ARGS))
    with pytest.raises(
        fasp_fx.CallError, match="argument 'before': dimension 1 is 5, the program was captured for 4"
    ):
        result.module(torch.randn(3, 5), torch.randn(3, 4), torch.randn(3, 3))


def test_what_the_caller_lets_vary_freezes_what_lies_between() -> None:
    """Widths that may trade with each other leave no fixed place for what lies between."""
    shapes = ({1: Dim.AUTO}, None, {1: Dim.AUTO})
    analysis = fasp_fx.analyze(joined(), ARGS, dynamic_shapes=shapes)
    reasons = {group.producers[0].name: group.reason for group in analysis.groups if group.producers}
    assert "a length known only at run time" in reasons["middle.weight"]
    assert [group.producers[0].name for group in analysis.select("prunable")] == ["out.0.weight"]


def test_what_lies_beside_two_axes_in_one_is_pruned() -> None:
    """One table for all fields, whose vectors lie side by side, beside what a network makes of them."""

    def forward(m: Any, fields: Tensor) -> Tensor:
        flat = m.table(fields).flatten(1)
        return m.out(torch.cat([flat, m.deep(flat)], dim=1))

    torch.manual_seed(0)
    deep = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    model = made(forward, table=nn.Embedding(30, 4), deep=deep, out=nn.Linear(20, 2))
    fields = torch.randint(30, (5, 3))
    result = fasp_fx.prune(model, (fields,), sparsity=0.4, score="random", restore=None)
    names = {group.consumers[0].name for group in result.plan.groups}
    assert names == {"deep.0.weight", "deep.2.weight", "out.weight"}, (
        "a dimension of the table, of all fields"
    )
    assert_exact(model, result, (fields,), (fields[:2].flip(1),))
