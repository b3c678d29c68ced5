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

from fasp_fx.hf._experiments import Experiments, written
from fasp_fx.hf._settings import ConfigKnob, KnobSearch

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
    producing = tuple(_member(model, name, rows, blocks) for name in producers)
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
    stem: str = "model.layers.{}.mlp",
    up: tuple[str, ...] = ("gate_proj", "up_proj"),
    down: str = "down_proj",
) -> Group:
    stem = stem.format(layer)
    rows = [f"{stem}.{name}.weight" for name in up]
    return _group(model, model.get_parameter(rows[0]).shape[0], rows, (f"{stem}.{down}.weight", 1))


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
    search = KnobSearch(Experiments(model), groups)
    knobs = [knob for rivals in search.rivals for knob in rivals]
    return [(str(knob), set(knob.groups)) for knob in knobs], search.inexpressible


@pytest.mark.parametrize("name", ["llama_gqa", "qwen3", "gemma2", "mistral"])
def test_heads_are_not_taken_for_smaller_heads(name: str) -> None:
    """Half as many heads and heads of half the size have the same weights; the table of positions, or a norm
    of a head's size, tells.
    """
    model = _meta(ZOO[name].make)
    groups = [_heads(model, layer, 2) for layer in range(2)] + [_feed(model, layer) for layer in range(2)]
    found, unsaid = _found(model, groups)
    assert found == [
        ("num_attention_heads=4, num_key_value_heads=2", {groups[0].name, groups[1].name}),
        ("intermediate_size=128", {groups[2].name, groups[3].name}),
    ]
    assert not unsaid


def test_a_field_that_the_config_lacks_is_pinned() -> None:
    model = _meta(qwen2)
    experiments = Experiments(model)
    assert {written(path): value for path, value in experiments.pins.items()} == {"head_dim": 8}
    search = KnobSearch(experiments, [_heads(model, layer, 2) for layer in range(2)])
    ((knob,),) = search.rivals
    assert knob.lowered(1) == {("num_attention_heads",): 2, ("num_key_value_heads",): 1}
    assert experiments.without_idle_pins(knob.lowered(1))["head_dim"] == 8
    assert "head_dim" not in {
        name for name, value in experiments.without_idle_pins({}).items() if value is not None
    }


def test_a_field_that_is_not_set_is_pinned() -> None:
    assert {written(path): value for path, value in Experiments(_meta(ZOO["gpt2"].make)).pins.items()} == {
        "n_inner": 256
    }


def test_heads_without_a_field_for_their_size_cannot_be_said() -> None:
    model = _meta(ZOO["opt"].make)
    stem = "model.decoder.layers.{}.self_attn"
    rows = [f"{stem.format(0)}.{name}_proj.weight" for name in "qkv"]
    group = _group(model, 4, rows, (f"{stem.format(0)}.out_proj.weight", 1), "head")
    found, unsaid = _found(model, [group])
    assert not found
    assert unsaid[group.name].startswith(
        "no field of OPTConfig can say it: none that is a multiple of 4 changes dimension 0 of"
        " model.decoder.layers.0"
    )


def test_lists_are_fields_by_layer() -> None:
    model = _meta(gemma3n)
    groups = [_feed(model, layer) for layer in range(2)]
    found, _ = _found(model, groups)
    assert found == [
        ("intermediate_size[0]=48", {groups[0].name}),
        ("intermediate_size[1]=64", {groups[1].name}),
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
    assert found == [("intermediate_size=48", {groups[0].name, groups[1].name})]


def test_a_knob_lowers_its_fields_in_proportion() -> None:
    knob = ConfigKnob(((("heads",), 9), (("kv",), 3)), 3, {})
    assert [knob.lowered(steps) for steps in range(3)] == [
        {("heads",): 9 - 3 * steps, ("kv",): 3 - steps} for steps in range(3)
    ]
