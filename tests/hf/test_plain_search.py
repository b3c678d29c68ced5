"""Which fields shrink which groups: found for architectures of many kinds, without capturing any of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from fasp_fx.groups import Group, Member
from plain_models import gemma3n, mixtral, qwen2
from torch import nn
from zoo import ZOO

from fasp_fx.hf._experiments import Experiments, find_knobs, written

pytestmark = pytest.mark.usefixtures("shared_captures")


def _meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


def _member(model: nn.Module, name: str, dim: int, blocks: int = 1) -> Member:
    size = model.get_parameter(name).shape[dim] * blocks
    return Member(name, dim, tuple(range(size)), size, 0 if blocks > 1 else None, blocks)


def _group(
    model: nn.Module,
    size: int,
    producers: list[str],
    consumer: tuple[str, int],
    granularity: str = "channel",
    rows: int = 0,
    blocks: int = 1,
) -> Group:
    producing = tuple(
        _member(model, name, rows if model.get_parameter(name).dim() > 1 else 0, blocks) for name in producers
    )
    consuming = (_member(model, *consumer, blocks),)
    return Group(
        consumer[0],
        size,
        blocks,
        "prunable",
        "",
        producing,
        consuming,
        np.arange(size),
        np.repeat(np.arange(blocks), size // blocks),
        granularity,
    )


def _feed(
    model: nn.Module,
    layer: int,
) -> Group:
    stem = f"model.layers.{layer}.mlp"
    rows = [f"{stem}.gate_proj.weight", f"{stem}.up_proj.weight"]
    return _group(model, model.get_parameter(rows[0]).shape[0], rows, (f"{stem}.down_proj.weight", 1))


def _heads(model: nn.Module, layer: int, heads: int) -> Group:
    stem = f"model.layers.{layer}.self_attn"
    rows = [f"{stem}.{name}_proj.weight" for name in "qkv"]
    rows += [
        f"{stem}.{name}_proj.bias"
        for name in "qkv"
        if getattr(model.get_submodule(f"{stem}.{name}_proj"), "bias", None) is not None
    ]
    return _group(model, heads, rows, (f"{stem}.o_proj.weight", 1), "head")


def _found(model: nn.Module, groups: list[Group]) -> tuple[list[tuple[str, set[str]]], dict[str, str]]:
    """What each knob says when it is turned by one step, and what it shrinks."""
    knobs, whole = find_knobs(Experiments(model), groups)
    said = [
        ", ".join(f"{written(path)}={value}" for path, value in knob.lowered(1).items()) for knob in knobs
    ]
    return [(text, set(knob.groups)) for text, knob in zip(said, knobs, strict=True)], whole


@pytest.mark.parametrize("name", ["llama_gqa", "qwen3", "gemma2", "mistral"])
def test_heads_are_not_taken_for_smaller_heads(name: str) -> None:
    """Half as many heads and heads of half the size have the same weights; the table of positions, or a norm
    of a head's size, tells.
    """
    model = _meta(ZOO[name].make)
    groups = [_heads(model, layer, 2) for layer in range(2)] + [_feed(model, layer) for layer in range(2)]
    found, unsaid = _found(model, groups)
    size = model.config.head_dim
    assert found == [
        (f"num_attention_heads=2, num_key_value_heads=1, head_dim={size}", {groups[0].name, groups[1].name}),
        ("intermediate_size=127", {groups[2].name, groups[3].name}),
    ]
    assert not unsaid


def test_a_field_that_the_config_lacks_is_set_along() -> None:
    model = _meta(qwen2)
    groups = [_heads(model, layer, 2) for layer in range(2)]
    found, _ = _found(model, groups)
    assert found == [
        ("num_attention_heads=2, num_key_value_heads=1, head_dim=8", {group.name for group in groups})
    ]


def test_a_field_that_is_not_set_is_found() -> None:
    model = _meta(ZOO["gpt2"].make)
    groups = [
        _group(model, 256, [f"{stem}.c_fc.weight", f"{stem}.c_fc.bias"], (f"{stem}.c_proj.weight", 0), rows=1)
        for stem in (f"transformer.h.{layer}.mlp" for layer in range(model.config.n_layer))
    ]
    assert _found(model, groups)[0] == [("n_inner=255", {group.name for group in groups})]


def test_heads_without_a_field_for_their_size_cannot_be_said() -> None:
    model = _meta(ZOO["opt"].make)
    stem = "model.decoder.layers.{}.self_attn"
    rows = [f"{stem.format(0)}.{name}_proj.weight" for name in "qkv"]
    group = _group(model, 4, rows, (f"{stem.format(0)}.out_proj.weight", 1), "head")
    found, unsaid = _found(model, [group])
    assert not found
    assert unsaid == {group.name: "no field of OPTConfig shrinks it and nothing else"}


def test_lists_are_fields_by_layer() -> None:
    model = _meta(gemma3n)
    groups = [_feed(model, layer) for layer in range(2)]
    found, _ = _found(model, groups)
    assert found == [
        ("intermediate_size[0]=47", {groups[0].name}),
        ("intermediate_size[1]=63", {groups[1].name}),
    ]


def test_stacked_experts_shrink_together() -> None:
    model = _meta(mixtral)
    stem = "model.layers.{}.mlp.experts"
    groups = [
        _group(
            model,
            96,
            [f"{stem.format(layer)}.gate_up_proj"],
            (f"{stem.format(layer)}.down_proj", 2),
            rows=1,
            blocks=2,
        )
        for layer in range(2)
    ]
    found, _ = _found(model, groups)
    assert found == [("intermediate_size=47", {groups[0].name, groups[1].name})]
