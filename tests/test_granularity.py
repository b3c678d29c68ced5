"""Heads beside channels, and norms whose eps is not given. Models of which heads go, or whose stream does,
are in corpus/attention.py.
"""

from __future__ import annotations

import pytest
import torch
from models import ZOO, randomise
from oracle import TOLERANCE, error, zeroed
from torch import nn

import fasp_fx


def test_heads_and_channels_in_one_plan_of_which_widths_alone_are_rounded() -> None:
    entry = ZOO["gpt2"]
    model = entry.build()
    result = fasp_fx.prune(
        model,
        (),
        entry.example(),
        granularity=("head", "channel"),
        sparsity=0.3,
        round_to=16,
        score="random",
        restore=None,
    )
    plan = fasp_fx.PruningPlan.from_json(result.plan.to_json())
    replayed = fasp_fx.apply(model, plan, (), entry.example())
    assert plan.granularity == ("channel", "head")
    assert {(group.granularity, group.size) for group in plan.groups} == {("head", 4), ("channel", 256)}
    widths = [g.size - g.removed_sets for g in plan.groups if g.granularity == "channel"]
    assert not any(width % 16 for width in widths)
    with torch.no_grad():
        found, again = (one.module(**entry.example(3)) for one in (result, replayed))
        assert error(found, zeroed(model, plan)(**entry.example(3))) <= TOLERANCE
    assert torch.equal(again.logits, found.logits)


def _normed(dtype: torch.dtype) -> nn.Module:
    """A norm by mean squares, with the eps that torch takes where none is given, and values so small that it
    shows.
    """
    layers = (nn.Linear(8, 32), nn.RMSNorm(32, eps=None), nn.Linear(32, 4))
    return randomise(nn.Sequential(*layers), std=1e-3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_eps_that_is_not_given_is_that_of_the_type_that_is_computed_in(dtype: torch.dtype) -> None:
    model, x = _normed(dtype), torch.randn(64, 8).to(dtype)
    result = fasp_fx.prune(
        model, (x,), include=("approximate",), sparsity={"2.weight": 0.5}, score="random", restore=None
    )
    masked = zeroed(model, result.plan, producers=True)
    assert error(result.module(x).float(), masked(x).float()) < (1e-5 if dtype == torch.float32 else 2e-2)
