"""Pruned language models that generate, are saved and are fine-tuned as those of transformers.

:func:`prune` makes one; importing fasp_fx lets ``AutoModelForCausalLM`` and ``AutoModelForSeq2SeqLM`` load it.
"""

from __future__ import annotations

from ._causal import PrunedForCausalLM
from ._config import PrunedConfig
from ._prune import Pruned, prune
from ._seq2seq import PrunedForSeq2SeqLM

__all__ = ["Pruned", "PrunedConfig", "PrunedForCausalLM", "PrunedForSeq2SeqLM", "prune"]
