"""What holds of plans, results and analyses, on a small decoder; :mod:`fasp_fx.testing` holds the invariants
of the design, on nets drawn at random as well (properties/test_programs.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from models import Decoder, Spec, build, tokens
from torch import nn

import fasp_fx
from fasp_fx.testing import check_program

SPEC = Spec(
    layers=2, hidden=8, kv_heads=2, repeat=2, head_dim=4, ffn=12, bias=True, gated=True, positions="rope"
)


def prune(model: nn.Module, sparsity: float = 0.3, **options: Any) -> fasp_fx.Result:
    return fasp_fx.prune(
        model, (tokens(2, 4),), sparsity=sparsity, **{"score": "random", "restore": None, **options}
    )


@pytest.mark.slow
def test_every_invariant_holds_for_a_decoder() -> None:
    check_program(build(replace(SPEC, layers=1)).double(), (tokens(2, 4),))


def test_a_plan_must_keep_blocks_even() -> None:
    model = build(SPEC)
    plan = prune(model).plan
    group = next(g for g in plan.groups if g.blocks > 1)

    def first(parts: Any, width: int) -> Any:
        return tuple(replace(part, removed=tuple(i for i in part.removed if i < width)) for part in parts)

    producers = first(group.producers, SPEC.head_dim)
    consumers = first(group.consumers, SPEC.head_dim * SPEC.repeat)
    uneven = replace(plan, groups=(replace(group, producers=producers, consumers=consumers),))
    with pytest.raises(fasp_fx.PlanError, match="same number"):
        fasp_fx.apply(model, uneven, (tokens(2, 4),))


def test_nothing_is_made_of_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        hollow = Decoder(SPEC).eval()
    with pytest.raises(fasp_fx.ArgumentError, match="meta"):
        fasp_fx.prune(hollow, (tokens(2, 4),), score="random", restore=None)


def test_explain() -> None:
    analysis = fasp_fx.analyze(build(SPEC), (tokens(2, 4),))
    path = analysis.explain("blocks.0.ffn.gate.weight", "blocks.0.ffn.down.weight")
    assert path[0] == "blocks.0.ffn.gate.weight"
    assert path[-1] == "blocks.0.ffn.down.weight"
    assert any("silu" in line for line in path)
    assert sum("linear" in line for line in path) == 2
    # weights of two layers meet in the hidden dimension alone; biases do not
    assert any(
        "add" in line for line in analysis.explain("blocks.0.ffn.gate.weight", "blocks.1.ffn.down.weight")
    )
    for first, second in (
        ("blocks.0.ffn.gate.bias", "blocks.1.ffn.up.bias"),
        ("blocks.0.attention.q.bias", "blocks.0.attention.out.weight"),
    ):
        with pytest.raises(fasp_fx.ArgumentError, match=f"couples channels of '{first}' with .* '{second}'"):
            analysis.explain(first, second)
    with pytest.raises(fasp_fx.ArgumentError, match="nowhere"):
        analysis.explain("nowhere", "blocks.0.ffn.down.weight")
