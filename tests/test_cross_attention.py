"""PyTorch's own attention between two sequences, which takes one packed weight apart before it projects with
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import made, parameter
from oracle import assert_exact
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

WIDTH, HEADS = 16, 4


def cross(several: bool = False) -> nn.Module:
    """Queries of one sequence, keys and values of another, or of two others."""

    def forward(m: Any, x: Tensor, memory: Tensor) -> Tensor:
        memory = m.second(memory)
        values = memory.flip(1) if several else memory
        return m.last(m.attention(m.first(x), memory, values, need_weights=False)[0].tanh())

    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    return made(forward, **ends(), attention=attention)


def decoder() -> nn.Module:
    """A decoder layer over a memory."""
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 24, batch_first=True)
    return made(
        lambda m, x, memory: m.last(m.decoder(m.first(x), m.second(memory))),
        **ends(),
        decoder=nn.TransformerDecoder(layer, 1),
    )


def ends() -> dict[str, nn.Module]:
    return {"first": nn.Linear(6, WIDTH), "second": nn.Linear(6, WIDTH), "last": nn.Linear(WIDTH, 3)}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "keys and values of one": cross,
    "keys and values of two": lambda: cross(several=True),
    "decoder": decoder,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "channels": {},
    "heads": {"granularity": ("head",), "sparsity": 0.15},
    "streams too": {"include": ("approximate",)},
    "queries and keys too": {"include": ("exempt",)},
}


def _inputs(seed: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 5, 6, generator=generator), torch.randn(batch, 7, 6, generator=generator)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name == "decoder" else name for name in MODELS],
)
def test_cross_attention_is_pruned_exactly(name: str) -> None:
    torch.manual_seed(0)
    model, inputs, unseen = MODELS[name](), _inputs(0), _inputs(1, batch=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    captured = fasp_fx.capture(model, inputs)
    for option, chosen in OPTIONS.items():
        result = fasp_fx.prune(captured, score="random", restore=None, **{"sparsity": 0.2, **chosen})
        if option != "queries and keys too":
            # Norms go on over the dense count: the producers are zero as well.
            dense_norms = option == "streams too" and name == "decoder"
            assert_exact(model, result, unseen, producers=dense_norms)
        narrower = {name for name, tensor in result.module.named_parameters() if "in_proj" in name}
        assert narrower, f"{option}: the projections stand as they are"
    values = [
        (group.blocks, group.size, set(member.indices))
        for group in fasp_fx.analyze(captured).select("prunable")
        for member in group.producers
        if "in_proj_weight" in member.name
    ]
    count = sum(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    assert values == [(HEADS, WIDTH, set(range(2 * WIDTH, 3 * WIDTH)))] * count
    parts = [part for group in result.plan.groups for part in (*group.producers, *group.consumers)]
    assert {part.name for part in parts} <= set(dict(model.named_parameters())), "the packed weight is named"


@pytest.mark.parametrize("causal", [True, False])
def test_positions_of_queries_stay_where_attention_numbers_them(causal: bool) -> None:
    """Queries of the model's own, whose positions a linear layer reads; causal, each sees keys up to its own
    number.
    """

    def forward(m: Any, x: Tensor) -> Tensor:
        queries = m.latents.expand(x.shape[0], -1, -1)
        mixed = F.scaled_dot_product_attention(queries, m.key(x), m.value(x), is_causal=causal)
        return m.last(mixed.transpose(1, 2))

    layers = {"key": nn.Linear(5, 4), "value": nn.Linear(5, 4), "last": nn.Linear(WIDTH, 3)}
    model, x = made(forward, latents=parameter(WIDTH, 4), **layers), torch.randn(2, 4, 5)
    found = [
        group for group in fasp_fx.analyze(model, (x,)).select("prunable") if "last.weight" in str(group)
    ]
    assert bool(found) is not causal
    if not causal:
        asked = {"score": "magnitude", "restore": None, "sparsity": {"last.weight": 0.5}}
        result = fasp_fx.prune(model, (x,), **asked)
        assert_exact(model, result, *((torch.randn(2, tokens, 5),) for tokens in (2, 4, 20)))
