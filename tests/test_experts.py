"""Mixtures of experts as transformers exports them: neurons of experts, interleaved gates among them."""

from __future__ import annotations

import torch
import transformers as hf
from conftest import one_capture
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, nn
from zoo import VOCABULARY, randomise

import fasp_fx

_SMALL = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCABULARY}
_ROUTED = {"num_experts_per_tok": 2}


def _gpt_oss() -> nn.Module:
    return hf.GptOssForCausalLM(hf.GptOssConfig(num_local_experts=4, head_dim=8, **_ROUTED, **_SMALL))


def _tokens(batch: int, length: int) -> dict[str, Tensor | bool]:
    numbers = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch))
    return {"input_ids": numbers, "use_cache": False}


def test_interleaved_gates_of_experts_lose_neurons() -> None:
    """Row 2i of a stacked weight is a gate, row 2i + 1 what it gates: both go with neuron i."""
    model = randomise(_gpt_oss(), std=0.5)
    with one_capture():
        result = fasp_fx.prune(model, (), _tokens(2, 7), sparsity=0.4, score="random", restore=None)
    experts = [group for group in result.plan.groups if any("down_proj" in part.name for part in group.consumers)]
    assert len(experts) == 1
    for group in experts:
        removed = {part.name.rpartition(".")[2]: set(part.removed) for part in (*group.producers, *group.consumers)}
        neurons = removed["down_proj"]
        assert 0 < len(neurons) < 12
        assert removed["gate_up_proj"] == removed["gate_up_proj_bias"] == {row for neuron in neurons for row in (2 * neuron, 2 * neuron + 1)}
    with torch.no_grad():
        found, expected, dense = (called(**_tokens(3, 9)).logits for called in (result.module, zeroed(model, result.plan), model))
    assert error(found, expected) <= TOLERANCE
    assert error(expected, dense) > 100 * TOLERANCE
