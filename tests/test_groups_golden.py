"""The groups of every zoo model: printed ones against golden files, and the essential ones against names
written by hand.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from zoo import ZOO

import fasp_fx

GOLDEN = Path(__file__).parent / "golden"
REGENERATE = os.environ.get("FASP_FX_REGENERATE") == "1"

#: weight name -> (dimension, indices); "{i}" stands for the layer
Rows = dict[str, tuple[int, list[int]]]


def rows(*spans: tuple[int, int]) -> list[int]:
    return [index for start, stop in spans for index in range(start, stop)]


def interleaved(parts: Iterable[int]) -> list[int]:
    """Rows of some parts of a fused weight laid out as [4 heads, 3, 16]."""
    return [head * 48 + part * 16 + channel for head in range(4) for part in parts for channel in range(16)]


@dataclass(frozen=True)
class Layer:
    """What a person who reads the model's source expects of one layer (two heads of keys and values stand for
    GQA).
    """

    value: Rows
    value_blocks: int
    output: tuple[str, int]
    up: Rows
    down: tuple[str, int]
    query_key: Rows


def separate(
    attention: str,
    output: str,
    up: list[str],
    down: str,
    *,
    kv: int,
    bias: bool = False,
    names: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj"),
) -> Layer:
    q, k, v = names
    kinds = ["weight", "bias"] if bias else ["weight"]
    return Layer(
        {f"{attention}.{v}.{kind}": (0, rows((0, 16 * kv))) for kind in kinds},
        kv,
        (f"{output}.weight", 1),
        {f"{name}.{kind}": (0, rows((0, 128))) for name in up for kind in kinds},
        (f"{down}.weight", 1),
        {f"{attention}.{q}.{kind}": (0, rows((0, 64))) for kind in kinds}
        | {f"{attention}.{k}.{kind}": (0, rows((0, 16 * kv))) for kind in kinds},
    )


def fused(
    qkv: str,
    value: list[int],
    query_key: list[int],
    blocks: int,
    output: str,
    up: str,
    down: str,
    *,
    bias: bool,
    hidden: int,
    transposed: bool = False,
) -> Layer:
    made, contracted = (1, 0) if transposed else (0, 1)

    def both(name: str, indices: list[int]) -> Rows:
        return {f"{name}.weight": (made, indices)} | ({f"{name}.bias": (0, indices)} if bias else {})

    return Layer(
        both(qkv, value),
        blocks,
        (f"{output}.weight", contracted),
        both(up, rows((0, hidden))),
        (f"{down}.weight", contracted),
        both(qkv, query_key),
    )


_DECODER = "model.layers.{i}"
_GATED = [f"{_DECODER}.mlp.gate_proj", f"{_DECODER}.mlp.up_proj"]


def _llama(kv: int) -> Layer:
    return separate(
        f"{_DECODER}.self_attn", f"{_DECODER}.self_attn.o_proj", _GATED, f"{_DECODER}.mlp.down_proj", kv=kv
    )


_OPT, _GPT2, _NEOX, _H, _BERT = (
    "model.decoder.layers.{i}",
    "transformer.h.{i}",
    "gpt_neox.layers.{i}",
    "transformer.h.{i}",
    "encoder.layer.{i}",
)
_FALCON = {
    "output": f"{_H}.self_attention.dense",
    "up": f"{_H}.mlp.dense_h_to_4h",
    "down": f"{_H}.mlp.dense_4h_to_h",
}

EXPECTED: dict[str, Layer] = {
    "llama_gqa": _llama(2),
    "llama_mha": _llama(4),
    "qwen3": _llama(2),
    "gemma2": _llama(2),
    "mistral": _llama(2),
    "opt": separate(
        f"{_OPT}.self_attn", f"{_OPT}.self_attn.out_proj", [f"{_OPT}.fc1"], f"{_OPT}.fc2", kv=4, bias=True
    ),
    "bert": separate(
        f"{_BERT}.attention.self",
        f"{_BERT}.attention.output.dense",
        [f"{_BERT}.intermediate.dense"],
        f"{_BERT}.output.dense",
        kv=4,
        bias=True,
        names=("query", "key", "value"),
    ),
    "gpt2": fused(
        f"{_GPT2}.attn.c_attn",
        rows((128, 192)),
        rows((0, 128)),
        4,
        f"{_GPT2}.attn.c_proj",
        f"{_GPT2}.mlp.c_fc",
        f"{_GPT2}.mlp.c_proj",
        bias=True,
        hidden=256,
        transposed=True,
    ),
    "gpt_neox": fused(
        f"{_NEOX}.attention.query_key_value",
        interleaved([2]),
        interleaved([0, 1]),
        4,
        f"{_NEOX}.attention.dense",
        f"{_NEOX}.mlp.dense_h_to_4h",
        f"{_NEOX}.mlp.dense_4h_to_h",
        bias=True,
        hidden=128,
    ),
    "bloom": fused(
        f"{_H}.self_attention.query_key_value",
        interleaved([2]),
        interleaved([0, 1]),
        4,
        bias=True,
        hidden=256,
        **_FALCON,
    ),
    # one key head and one value head behind the four query heads
    "falcon_mqa": fused(
        f"{_H}.self_attention.query_key_value",
        rows((80, 96)),
        rows((0, 80)),
        1,
        bias=False,
        hidden=256,
        **_FALCON,
    ),
    # two groups of [two query heads, key head, value head]
    "falcon_new": fused(
        f"{_H}.self_attention.query_key_value",
        rows((48, 64), (112, 128)),
        rows((0, 48), (64, 112)),
        2,
        bias=False,
        hidden=256,
        **_FALCON,
    ),
    # queries (64 rows), keys (32), values (32); gate and up in one weight
    "phi3": Layer(
        {f"{_DECODER}.self_attn.qkv_proj.weight": (0, rows((96, 128)))},
        2,
        (f"{_DECODER}.self_attn.o_proj.weight", 1),
        {f"{_DECODER}.mlp.gate_up_proj.weight": (0, rows((0, 256)))},
        (f"{_DECODER}.mlp.down_proj.weight", 1),
        {f"{_DECODER}.self_attn.qkv_proj.weight": (0, rows((0, 96)))},
    ),
}


def printed(name: str, analysis: fasp_fx.Analysis) -> str:
    return (
        "\n".join(
            [
                f"# {name}: {len(analysis.groups)} groups, at most {analysis.max_sparsity:.4f}",
                *map(str, analysis.groups),
            ]
        )
        + "\n"
    )


@pytest.mark.parametrize("name", ZOO)
def test_groups(name: str, zoo_analysis: Callable[[str], fasp_fx.Analysis]) -> None:
    analysis = zoo_analysis(name)
    for layer in range(2):
        _check_layer(analysis, EXPECTED[name], layer)
    assert len(analysis.select("prunable")) == 4, (
        "there is a prunable group besides the value channels and the FFN of each layer"
    )
    for group in analysis.groups:
        assert bool(group.reason) == (group.status != "prunable"), (
            f"{group.name} is {group.status} with reason '{group.reason}'"
        )
        together = np.sort(group.sets)
        assert len(np.unique(together)) == group.size
        assert group.size % group.blocks == 0
    file = GOLDEN / f"{name}.txt"
    text = printed(name, analysis)
    if REGENERATE:
        file.write_text(text)
    assert file.read_text() == text, (
        "the printed groups differ from the golden file; if that is meant, regenerate with"
        " FASP_FX_REGENERATE=1"
    )


def _check_layer(analysis: fasp_fx.Analysis, expected: Layer, layer: int) -> None:
    def at(text: str) -> str:
        return text.replace("{i}", str(layer))

    for produced, blocks, consumer in (
        (expected.value, expected.value_blocks, expected.output),
        (expected.up, 1, expected.down),
    ):
        wanted = {(at(name), dim): indices for name, (dim, indices) in produced.items()}
        found = [
            g
            for g in analysis.select("prunable")
            if [(m.name, m.dim) for m in g.consumers] == [(at(consumer[0]), consumer[1])]
        ]
        assert len(found) == 1, f"no single prunable group is consumed by {at(consumer[0])}"
        assert {(m.name, m.dim): list(m.indices) for m in found[0].producers} == wanted
        assert found[0].blocks == blocks
        assert len(found[0].consumers[0].indices) == found[0].consumers[0].size, (
            "the group does not cover all columns of its consumer"
        )
    exempt: dict[tuple[str, int], set[int]] = {}
    for group in analysis.select("exempt"):
        assert not group.consumers, f"the exempt group {group.name} has consumers"
        for member in group.producers:
            exempt.setdefault((member.name, member.dim), set()).update(member.indices)
    for name, (dim, indices) in expected.query_key.items():
        assert exempt.get((at(name), dim)) == set(indices), (
            f"the rows of {at(name)} that make queries and keys are not exactly its exempt ones"
        )


def test_every_model_is_expected() -> None:
    assert set(EXPECTED) == set(ZOO)
    assert {file.stem for file in GOLDEN.glob("*.txt")} == set(ZOO)
