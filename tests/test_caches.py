"""A cache among the inputs of a program: heads and widths are channels, lengths are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fasp_fx
from fasp_fx.base.compat._transformers import CACHE

pytestmark = pytest.mark.usefixtures("shared_captures")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    return LlamaForCausalLM(config).eval().double()


def _call(past: int, new: int, width: int = 8) -> dict[str, Any]:
    torch.manual_seed(past)
    cache = DynamicCache()
    cache.update(
        torch.randn(2, 2, past, 8, dtype=torch.float64),
        torch.randn(2, 2, past, width, dtype=torch.float64),
        0,
    )
    return {
        "input_ids": torch.randint(0, 50, (2, new)),
        "attention_mask": torch.ones(2, past + new, dtype=torch.long),
        CACHE: cache,
    }


def test_values_leave_weights_and_cache(model: Any) -> None:
    result = fasp_fx.prune(model, (), _call(4, 3), sparsity=0.2, score="magnitude", restore=None)
    line = next(line for line in result.report.lines if line.name.endswith("o_proj.weight"))
    assert (line.status, line.blocks) == ("prunable", 2)  # each of the two heads may lose channels of its own
    gone = next(group for group in result.plan.groups if group.name == line.name).producers[0].removed
    kept = torch.tensor([index for index in range(16) if index not in gone]).reshape(2, -1)
    heads = torch.tensor(kept.shape[1])
    assert result.report.cache == (2 * (8 + 8) * 8, 2 * (8 + int(heads)) * 8)
    assert result.program.example_inputs is not None

    # The dense model whose cache and value rows are zero where channels went computes the same.
    given = _call(6, 2)
    values = given[CACHE].layers[0].values
    mask = torch.zeros(16, dtype=torch.float64).index_fill_(0, kept.flatten(), 1).reshape(1, 2, 1, 8)
    given[CACHE].layers[0].values = values * mask
    narrow = {**_call(6, 2), CACHE: DynamicCache()}
    within = kept - torch.tensor([[0], [8]])
    taken = torch.stack([values[:, head].index_select(-1, within[head]) for head in range(2)], 1)
    narrow[CACHE].update(given[CACHE].layers[0].keys, taken, 0)
    layer = model.model.layers[0]
    rows = layer.self_attn.v_proj.weight.detach().clone()
    columns = layer.mlp.down_proj.weight.detach().clone()
    neurons = list(
        next(group for group in result.plan.groups if group.name.endswith("down_proj.weight"))
        .consumers[0]
        .removed
    )
    try:
        with torch.no_grad():
            layer.self_attn.v_proj.weight.index_fill_(0, torch.tensor(gone), 0)
            layer.mlp.down_proj.weight.index_fill_(1, torch.tensor(neurons), 0)
            expected, found = model(**given, use_cache=True), result.module(**narrow)
    finally:
        with torch.no_grad():
            layer.self_attn.v_proj.weight.copy_(rows)
            layer.mlp.down_proj.weight.copy_(columns)
    assert torch.allclose(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    assert found[CACHE].layers[0].values.shape == (2, 2, 8, int(heads))
