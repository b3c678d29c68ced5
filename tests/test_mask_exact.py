"""Every zoo model, pruned without restoration, computes what the dense model does with the removed columns of
its consumers' inputs zeroed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import PROFILE
from models import made
from oracle import assert_mask_exact, error, floats, masked
from torch import Tensor, nn
from zoo import ZOO, Entry

import fasp_fx
from fasp_fx.testing import check_program

pytestmark = pytest.mark.usefixtures("shared_captures")

#: batch and length, none of them that of the capture (2, 7); batch 1 among them
SHAPES = ((1, 5), (3, 11))

#: sparsity as a number, or as a share of the most that can be asked for; the latter of two models in every
#: profile
_FEW = ((0.3, "random"), ("most", "magnitude"))
#: differ little from others: in the number of heads, in a window
_LIKE_OTHERS = ("falcon_mqa", "falcon_new", "llama_mha", "mistral")
_ALL = tuple((sparsity, score) for sparsity in (0.1, 0.3, 0.5, "most") for score in ("random", "magnitude"))


def _check(entry: Entry, model: nn.Module, result: fasp_fx.Result, seed: int = 5) -> None:
    for batch, tokens in SHAPES:
        inputs = entry.inputs(batch, tokens, seed)
        assert_mask_exact(
            model, result, lambda called, inputs=inputs: called(**inputs, **dict(entry.constants))
        )


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in _LIKE_OTHERS else name for name in ZOO],
)
def test_mask_exact(
    name: str,
    zoo_model: Callable[[str], nn.Module],
    zoo_captured: Callable[[str], fasp_fx.Captured],
    zoo_analysis: Callable[[str], fasp_fx.Analysis],
) -> None:
    entry, model, prunable = ZOO[name], zoo_model(name), zoo_analysis(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for sparsity, score in _ALL if PROFILE == "slow" else _FEW[: 1 + (name in ("opt", "llama_gqa"))]:
        wanted = prunable.max_sparsity if sparsity == "most" else sparsity
        result = fasp_fx.prune(zoo_captured(name), sparsity=wanted, score=score, restore=None)
        assert result.plan.sparsity == pytest.approx(wanted, abs=0.02)
        assert {group.name for group in result.plan.groups} == {
            group.name for group in prunable.select("prunable")
        }
        _check(entry, model, result)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), (
        "pruning changed the caller's model"
    )


def test_the_oracle_sees_a_wrong_column(zoo_model: Callable[[str], nn.Module]) -> None:
    """Masking one other column must be far outside the tolerance, or the comparison above says little."""
    entry, model = ZOO["opt"], zoo_model("opt")
    name = "model.decoder.layers.1.fc2.weight"

    def call(columns: list[int]) -> Any:
        with torch.no_grad(), masked(model, {name: columns}):
            return model(**entry.inputs(3, 11), use_cache=False)

    assert error(call([3, 8]), call([3, 9])) > 1e-3
    assert len(floats(call([3]))) == 1


def _shared_mask(dims: int) -> nn.Module:
    """Four heads of queries over two of keys and values, with one mask for all heads and the whole batch."""

    def forward(self: Any, x: Tensor) -> Tensor:
        layers = (self.query, self.key, self.value)
        query, key, value = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in layers)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, self.mask, enable_gqa=True)
        return self.out(attended.transpose(1, 2).flatten(2))

    sizes = {"query": (6, 16), "key": (6, 8), "value": (6, 8), "out": (16, 3)}
    mask = torch.ones(5, 5).tril().bool()[(None,) * (dims - 2)]
    return made(forward, **{name: nn.Linear(*size) for name, size in sizes.items()}, mask=mask)


@pytest.mark.parametrize("dims", [2, 3, 4])
def test_grouped_queries_under_a_mask_of_any_dimensions(dims: int) -> None:
    torch.manual_seed(0)
    model, x = _shared_mask(dims).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    (values,) = [group for group in fasp_fx.analyze(model, (x,)).groups if group.status == "prunable"]
    assert str(values) == "prunable         2 x 4  value.weight[0], value.bias[0] -> out.weight[1]"
    for granularity in (("channel",), ("channel", "head")):
        check_program(model, (x,), granularity=granularity, invariants=("mask-exact",))
