"""Let transformers' Auto classes find pruned models by their configuration."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ._causal import PrunedForCausalLM
from ._config import PrunedConfig
from ._seq2seq import PrunedForSeq2SeqLM


def register_models() -> None:
    """Register the models."""
    AutoModelForCausalLM.register(PrunedConfig, PrunedForCausalLM, exist_ok=True)
    AutoModelForSeq2SeqLM.register(PrunedConfig, PrunedForSeq2SeqLM, exist_ok=True)


__all__ = ["register_models"]
