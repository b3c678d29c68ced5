"""PyTorch's own attention between two sequences, which takes one packed weight apart before it projects with
it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, nn

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

WIDTH, HEADS = 16, 4


class Cross(nn.Module):
    """Queries of one sequence, keys and values of another, or of two others."""

    def __init__(self, several: bool, bias: bool = True, **options: Any) -> None:
        super().__init__()
        self.several = several
        self.first, self.second = nn.Linear(6, WIDTH), nn.Linear(6, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, bias=bias, **options)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        memory = self.second(memory)
        values = memory.flip(1) if self.several else memory
        return self.last(self.attention(self.first(x), memory, values, need_weights=False)[0].tanh())


class Decoder(nn.Module):
    """One or two decoder layers over a memory."""

    def __init__(self, layers: int, **options: Any) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, WIDTH), nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(WIDTH, HEADS, 24, batch_first=True, **options), layers
        )

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.last(self.decoder(self.first(x), self.second(memory)))


MODELS = {
    "keys and values of one": lambda: Cross(several=False),
    "without bias": lambda: Cross(several=False, bias=False),
    "keys and values of two": lambda: Cross(several=True),
    "decoder": lambda: Decoder(1),
    "decoder, norm first": lambda: Decoder(1, norm_first=True, activation="gelu"),
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


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_cross_attention_is_pruned_exactly(name: str) -> None:
    model, inputs, unseen = _model(name), _inputs(0), _inputs(1, batch=3)
    captured = fasp_fx.capture(model, inputs)
    for option, chosen in OPTIONS.items():
        result = fasp_fx.prune(captured, score="random", restore=None, **{"sparsity": 0.2, **chosen})
        # Norms go on over the dense count: the producers are zero as well.
        dense_norms = option == "streams too" and name.startswith("decoder")
        with torch.no_grad():
            reference = zeroed(model, result.plan, producers=dense_norms)
            dense, expected, found = model(*unseen), reference(*unseen), result.module(*unseen)
        if option != "queries and keys too":
            assert error(found, expected) <= TOLERANCE, option
        assert error(found, dense) > 100 * TOLERANCE, option
        narrower = {name for name, tensor in result.module.named_parameters() if "in_proj" in name}
        assert narrower, f"{option}: the projections stand as they are"
    _check_values(model, fasp_fx.analyze(captured))


def _check_values(model: nn.Module, analysis: fasp_fx.Analysis) -> None:
    """Values go with the columns that take them."""
    values = [
        group
        for group in analysis.groups
        if group.status == "prunable" and any("in_proj_weight" in member.name for member in group.producers)
    ]
    assert len(values) == sum(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    for group in values:
        assert (group.blocks, group.size) == (HEADS, WIDTH)
        (weight,) = [member for member in group.producers if member.name.endswith("in_proj_weight")]
        assert set(weight.indices) == set(range(2 * WIDTH, 3 * WIDTH))


def test_a_plan_names_the_packed_weight(tmp_path: Any) -> None:
    model, inputs = _model("decoder"), _inputs(0)
    captured = fasp_fx.capture(model, inputs)
    result = fasp_fx.prune(captured, sparsity=0.3, score="random", restore=None, include=("approximate",))
    names = set(dict(model.named_parameters()))
    parts = [part for group in result.plan.groups for part in (*group.producers, *group.consumers)]
    assert {part.name for part in parts} <= names
    assert all(len(set(part.removed)) == len(part.removed) for part in parts if part.block_dim is None)
    again = fasp_fx.apply(captured, fasp_fx.PruningPlan.from_json(result.plan.to_json()))
    loaded = fasp_fx.load(result.save(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again.module(*inputs), result.module(*inputs))
        assert torch.equal(loaded.module(*inputs), result.module(*inputs))


def test_restoration_helps() -> None:
    model, inputs = _model("decoder"), _inputs(0, batch=64)
    captured = fasp_fx.capture(model, inputs)
    with torch.no_grad():
        dense = model(*inputs)
        errors = [
            error(
                fasp_fx.prune(captured, calibration=[inputs], sparsity=0.3, restore=how).module(*inputs),
                dense,
            )
            for how in (None, "least-squares")
        ]
    assert errors[1] < errors[0]


class Latents(nn.Module):
    """Queries of the model's own, whose positions a linear layer reads; causal, each sees keys up to its own
    number.
    """

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.latents = nn.Parameter(torch.randn(WIDTH, 4))
        self.key, self.value, self.last = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.latents.expand(x.shape[0], -1, -1)
        mixed = nn.functional.scaled_dot_product_attention(
            queries, self.key(x), self.value(x), is_causal=self.causal
        )
        return self.last(mixed.transpose(1, 2))


def test_positions_of_queries_stay_where_attention_numbers_them() -> None:
    x = torch.randn(2, 4, 5)
    analysis = fasp_fx.analyze(Latents(causal=True).eval(), (x,))
    assert not any(group.status == "prunable" and "last.weight" in str(group) for group in analysis.groups)
    model = Latents(causal=False).eval()
    result = fasp_fx.prune(model, (x,), score="magnitude", restore=None, sparsity={"last.weight": 0.5})
    expected = zeroed(model, result.plan)
    for tokens in (2, 4, 20):
        longer = torch.randn(2, tokens, 5)
        assert error(result.module(longer), expected(longer)) < TOLERANCE
