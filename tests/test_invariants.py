"""What holds of plans, results and analyses, on a small decoder; :mod:`fasp_fx.testing` holds the invariants
of the design, on nets drawn at random as well (properties/test_programs.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from captures import one_capture
from decoders import Spec, build, tokens
from invariants import OF_OPERATORS
from oracle import TOLERANCE, error
from torch import nn

import fasp_fx
from fasp_fx.testing import INVARIANTS, check_program

pytestmark = pytest.mark.usefixtures("shared_captures")

SPEC = Spec(
    layers=2, hidden=8, kv_heads=2, repeat=2, head_dim=4, ffn=12, bias=True, gated=True, positions="rope"
)


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def prune(model: nn.Module, sparsity: float = 0.3, **options: Any) -> fasp_fx.Result:
    return fasp_fx.prune(
        model, (tokens(2, 4),), sparsity=sparsity, **{"score": "random", "restore": None, **options}
    )


@pytest.mark.parametrize(
    ("spec", "invariants"),
    [
        pytest.param(replace(SPEC, layers=1), tuple(INVARIANTS), marks=pytest.mark.slow),
        (replace(SPEC, layers=1, repeat=1, projection="stacked"), OF_OPERATORS),
    ],
)
def test_every_invariant_holds_for_a_decoder(spec: Spec, invariants: tuple[str, ...]) -> None:
    check_program(build(spec).double(), (tokens(2, 4),), invariants=invariants)


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


def test_pruning_group_after_group() -> None:
    model, example = build(SPEC), (tokens(2, 4),)
    with one_capture():
        both = prune(model)
        first = fasp_fx.apply(model, replace(both.plan, groups=both.plan.groups[:1]), example)
        rest = replace(both.plan, groups=both.plan.groups[1:])
        second = fasp_fx.apply(first.module, rest.after(first.plan), example)
    assert same_weights(second.module, both.module)
    assert not same_weights(first.module, both.module)
    assert torch.equal(second.module(tokens(3, 6)), both.module(tokens(3, 6)))


def test_frozen_parameters_stay_frozen() -> None:
    model = build(SPEC)
    model.embed.weight.requires_grad_(False)
    result = prune(model)
    assert {name for name, p in result.module.named_parameters() if not p.requires_grad} == {"embed.weight"}


def test_meta_device() -> None:
    model = build(SPEC)
    with torch.device("meta"):
        hollow = type(model)(SPEC).eval()
    analysis = fasp_fx.analyze(hollow, (tokens(2, 4),))
    assert list(map(str, analysis.groups)) == list(map(str, fasp_fx.analyze(model, (tokens(2, 4),)).groups))
    with pytest.raises(fasp_fx.ArgumentError, match="meta"):
        fasp_fx.prune(hollow, (tokens(2, 4),), score="random", restore=None)


def test_all_kinds_of_models() -> None:
    model, example = build(SPEC), (tokens(2, 4),)
    dim = torch.export.Dim.AUTO
    exported = torch.export.export(model, example, dynamic_shapes=({0: dim, 1: dim},), strict=False)
    kinds: Mapping[str, Any] = {"module": model, "graph module": exported.module(), "program": exported}
    results = {
        kind: fasp_fx.prune(given, example, sparsity=0.3, score="random", restore=None)
        for kind, given in kinds.items()
    }
    expected = results["module"].module(tokens(2, 4))
    for kind, result in results.items():
        assert result.plan.slices() == results["module"].plan.slices(), kind
        assert error(result.module(tokens(2, 4)), expected) <= TOLERANCE, kind
    assert results["program"].module(tokens(3, 6)).shape[:2] == (3, 6)


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
        assert analysis.explain(first, second) == []
    with pytest.raises(fasp_fx.ArgumentError, match="nowhere"):
        analysis.explain("nowhere", "blocks.0.ffn.down.weight")
