"""Whole heads, and groups that cross a norm: pruned only when asked, and then exactly as said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, nn
from zoo import ZOO, randomise

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def _vit() -> nn.Module:
    return hf.ViTModel(hf.ViTConfig(image_size=16, patch_size=4, **_SMALL))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Any]]]] = {
    **{
        name: (ZOO[name].build, lambda batch, name=name: ZOO[name].example(batch))
        for name in ("llama_gqa", "bert")
    },
    "vit": (
        lambda: randomise(_vit()),
        lambda batch: {
            "pixel_values": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
        },
    ),
}


def _main(output: Any) -> Tensor:
    return output["logits"] if "logits" in output else output["last_hidden_state"]


@pytest.mark.parametrize("name", ["llama_gqa", pytest.param("bert", marks=pytest.mark.slow), "vit"])
def test_whole_heads_are_mask_exact(name: str) -> None:
    build, inputs = MODELS[name]
    model = build()
    analysis = fasp_fx.analyze(model, (), inputs(2), granularity=("head",))
    result = fasp_fx.prune(
        model,
        (),
        inputs(2),
        granularity=("head",),
        sparsity=analysis.max_sparsity,
        score="random",
        restore=None,
    )
    heads = analysis.chosen
    assert heads
    assert all(group.granularity == "head" and group.size in (2, 4) for group in heads)
    assert all(group.producers for group in heads)
    before, after = dict(model.named_parameters()), dict(result.module.named_parameters())
    for member in (member for group in heads for member in (*group.producers, *group.consumers)):
        if member.name in before:
            assert after[member.name].shape[member.dim] < before[member.name].shape[member.dim], member.name
    with torch.no_grad():
        found, expected, dense = (
            _main(called(**inputs(3))) for called in (result.module, zeroed(model, result.plan), model)
        )
    assert error(found, expected) <= TOLERANCE
    assert error(expected, dense) > 100 * TOLERANCE


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


@pytest.mark.parametrize(
    "name", ["llama_gqa", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "gemma2"))]
)
def test_the_residual_stream_when_asked(name: str) -> None:
    """Layer norms and norms by mean squares go on to divide by the dense count."""
    entry = ZOO[name]
    model = entry.build()
    stream = [
        group
        for group in fasp_fx.analyze(model, (), entry.example(), include=("approximate",)).chosen
        if group.status == "approximate"
    ]
    result = fasp_fx.prune(
        model, (), entry.example(), include=("approximate",), sparsity=0.4, score="random", restore=None
    )
    assert stream
    removed = {group.name for group in result.plan.groups}
    assert {group.name for group in stream} <= removed
    with torch.no_grad():
        expected = zeroed(model, result.plan, producers=True)(**entry.example(3))
        assert error(result.module(**entry.example(3)), expected) <= TOLERANCE
        assert error(expected, model(**entry.example(3))) > 100 * TOLERANCE


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
