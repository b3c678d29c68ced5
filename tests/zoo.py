"""Small, randomly initialised models of many architectures.

Weights are scaled up and biases and norm weights randomised, so that outputs are far from zero, every term
matters and a wrong channel shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from models import randomise
from torch import Tensor, nn

VOCABULARY = 96
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}


@dataclass(frozen=True)
class Entry:
    """One model of the zoo: how to build it, and the names of the arguments that stay constant."""

    name: str
    make: Callable[[], nn.Module]
    constants: tuple[tuple[str, Any], ...] = (("use_cache", False),)

    def build(self, seed: int = 0) -> nn.Module:
        """A fresh model; equal seeds give equal weights."""
        return randomise(self.make(), seed)

    def inputs(self, batch: int, tokens: int, seed: int = 1) -> dict[str, Tensor]:
        """Random token numbers, the only tensor input."""
        generator = torch.Generator().manual_seed(seed)
        return {"input_ids": torch.randint(0, VOCABULARY, (batch, tokens), generator=generator)}

    def example(self, batch: int = 2, tokens: int = 7) -> dict[str, Any]:
        """Keyword arguments for a capture."""
        return {**self.inputs(batch, tokens), **dict(self.constants)}


def _opt() -> nn.Module:
    return hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=64,
            ffn_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            word_embed_proj_dim=64,
        )
    )


def _falcon(**options: Any) -> nn.Module:
    return hf.FalconForCausalLM(
        hf.FalconConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY, **options
        )
    )


ZOO: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("llama_gqa", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **_SMALL))),
        Entry(
            "llama_mha",
            lambda: hf.LlamaForCausalLM(
                hf.LlamaConfig(num_key_value_heads=4, tie_word_embeddings=True, **_SMALL)
            ),
        ),
        Entry("opt", _opt),
        Entry(
            "gpt2",
            lambda: hf.GPT2LMHeadModel(
                hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64)
            ),
        ),
        Entry("gpt_neox", lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SMALL))),
        Entry(
            "phi3", lambda: hf.Phi3ForCausalLM(hf.Phi3Config(num_key_value_heads=2, pad_token_id=0, **_SMALL))
        ),
        Entry(
            "qwen3", lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(num_key_value_heads=2, head_dim=16, **_SMALL))
        ),
        Entry(
            "gemma2",
            lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(num_key_value_heads=2, head_dim=16, **_SMALL)),
        ),
        Entry("mistral", lambda: hf.MistralForCausalLM(hf.MistralConfig(num_key_value_heads=2, **_SMALL))),
        Entry("falcon_mqa", lambda: _falcon()),
        Entry("falcon_new", lambda: _falcon(num_kv_heads=2, new_decoder_architecture=True)),
        Entry(
            "bloom",
            lambda: hf.BloomForCausalLM(
                hf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCABULARY)
            ),
        ),
        Entry("bert", lambda: hf.BertModel(hf.BertConfig(**_SMALL)), constants=()),
    )
}


class TwoLayers(nn.Module):
    """Linear, GELU, linear: the smallest model with a prunable group."""

    def __init__(self, width: int = 12, hidden: int = 20) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.nn.functional.gelu(self.first(x)))
