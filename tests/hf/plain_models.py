"""Small causal models for plain checkpoints, and how each is pruned: no data, and nothing repaired, so that
the masked dense model is an oracle.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf
from models import VOCABULARY, ZOO, randomise
from torch import Tensor, nn

from fasp_fx.hf import Pruned, prune

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}


def gemma3n() -> nn.Module:
    """Feed-forward layers of two widths, which its config says as a list."""
    return hf.Gemma3nForCausalLM(
        hf.Gemma3nTextConfig(
            **SMALL,
            intermediate_size=[48, 64],
            num_key_value_heads=2,
            head_dim=8,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            laurel_rank=8,
            activation_sparsity_pattern=[0.0, 0.0],
            layer_types=["full_attention"] * 2,
            pad_token_id=0,
        )
    )


def qwen2() -> nn.Module:
    return hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**SMALL, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=True)
    )


def opt() -> nn.Module:
    """The size of a head is what the heads leave of the width."""
    return hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            ffn_dim=64,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
        )
    )


def mixtral() -> nn.Module:
    """Experts in one stacked weight."""
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, num_local_experts=2)
    )


@dataclass(frozen=True)
class Case:
    """A model, how it is pruned, and the fields of its config that must have changed, before and after."""

    make: Callable[[], nn.Module]
    fields: dict[str, tuple[Any, Any]]
    sparsity: float = 0.25
    round_to: int = 8


FEED = {**SMALL, "num_hidden_layers": 1, "intermediate_size": 64}
SIXTEEN = {"num_key_value_heads": 2, "head_dim": 16}
NARROWER = {"intermediate_size": (64, 40)}
CASES: dict[str, Case] = {
    "llama": Case(ZOO["llama_gqa"].make, {"num_attention_heads": (4, 4), "intermediate_size": (128, 80)}),
    "qwen3": Case(
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**FEED, **SIXTEEN)), {"intermediate_size": (64, 32)}
    ),
    "gpt2": Case(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=VOCABULARY, n_positions=64)
        ),
        {"n_inner": (None, 80), "n_head": (4, 4)},
    ),
    "opt": Case(opt, {"ffn_dim": (64, 32), "num_attention_heads": (4, 4)}),
    "gemma2": Case(
        lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**FEED, **SIXTEEN)), {"intermediate_size": (64, 32)}
    ),
}
#: take longer to capture, or change what others change
MORE: dict[str, Case] = {
    "mistral": Case(
        lambda: hf.MistralForCausalLM(hf.MistralConfig(**FEED, num_key_value_heads=2)),
        {**NARROWER, "num_key_value_heads": (2, 2)},
    ),
    "qwen2": Case(qwen2, NARROWER),
    "phi3": Case(ZOO["phi3"].make, {"intermediate_size": (128, 80)}),
    "gemma3n": Case(gemma3n, {"intermediate_size": ([48, 64], [32, 40])}),
    "mixtral": Case(mixtral, {"intermediate_size": (48, 16)}, 0.5),
}


@cache
def dense(name: str) -> nn.Module:
    """The model; tests must not change it."""
    return randomise({**CASES, **MORE}[name].make())


@cache
def plain(name: str) -> Pruned:
    """Its plain checkpoint; tests must not change it."""
    case = {**CASES, **MORE}[name]
    return prune(
        dense(name),
        format="plain",
        sparsity=case.sparsity,
        round_to=case.round_to,
        score="random",
        restore=None,
    )


def tokens(batch: int = 3, length: int = 9) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch))
