"""Which fields shrink which groups: found for architectures of many kinds, without capturing any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from models import ZOO
from plain_models import gemma3n, mixtral
from torch import nn

from fasp_fx.analysis import Group, Member
from fasp_fx.hf._fields import Experiments, arrange, find_fields, lowered, units, written


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
        "channel",
    )


def _feed(
    model: nn.Module,
    layer: int,
) -> Group:
    stem = f"model.layers.{layer}.mlp"
    rows = [f"{stem}.gate_proj.weight", f"{stem}.up_proj.weight"]
    return _group(model, model.get_parameter(rows[0]).shape[0], rows, (f"{stem}.down_proj.weight", 1))


def _found(model: Any, groups: list[Group]) -> list[tuple[str, set[str]]]:
    """What each field says when it is turned by one step, and what it shrinks."""
    experiments = Experiments(type(model), model.config)
    fields = find_fields(experiments, (place for group in groups for place in units(group)))
    places = arrange(groups, fields, ("",))
    found = []
    for place in sorted({place for place in places if place is not None}):
        shrunk = [group for group, own in zip(groups, places, strict=True) if own == place]
        lost = {at: by for group in shrunk for at, by in units(group).items()}
        ((path, steps),) = lowered(lost, fields)[0].items()
        value = next(field.value for field in fields if field.path == path)
        found.append((f"{written(path)}={value - steps}", {group.name for group in shrunk}))
    return found


def test_groups_of_all_layers_are_found_together() -> None:
    model = _meta(ZOO["qwen3"].make)
    groups = [_feed(model, layer) for layer in range(2)]
    assert _found(model, groups) == [("intermediate_size=127", {group.name for group in groups})]


def test_a_field_that_is_not_set_is_found() -> None:
    model = _meta(ZOO["gpt2"].make)
    groups = [
        _group(model, 256, [f"{stem}.c_fc.weight", f"{stem}.c_fc.bias"], (f"{stem}.c_proj.weight", 0), rows=1)
        for stem in (f"transformer.h.{layer}.mlp" for layer in range(model.config.n_layer))
    ]
    assert _found(model, groups) == [("n_inner=255", {group.name for group in groups})]


def test_lists_are_fields_by_layer() -> None:
    model = _meta(gemma3n)
    groups = [_feed(model, layer) for layer in range(2)]
    found = _found(model, groups)
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
    found = _found(model, groups)
    assert found == [("intermediate_size=47", {groups[0].name, groups[1].name})]
