"""Pruned language models that generate, are saved and are fine-tuned as those of transformers.

:func:`prune` makes one; importing fasp_fx lets ``AutoModelForCausalLM`` and ``AutoModelForSeq2SeqLM`` load
it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._config import PrunedConfig, on_first_use

if TYPE_CHECKING:
    from ._generating import PrunedForCausalLM, PrunedForSeq2SeqLM
    from ._offloaded import load_offloaded
    from ._prune import CapturedModel, Pruned, analyze, apply, capture, measure, prune

_HOMES = {
    **dict.fromkeys(
        ("CapturedModel", "Pruned", "analyze", "apply", "capture", "measure", "prune"), "._prune"
    ),
    "PrunedForCausalLM": "._generating",
    "PrunedForSeq2SeqLM": "._generating",
    "load_offloaded": "._offloaded",
}


def _register_models() -> None:
    """Here rather than at once, because importing the models takes long, and only who has a configuration of
    one needs them.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from ._generating import PrunedForCausalLM, PrunedForSeq2SeqLM

    AutoModelForCausalLM.register(PrunedConfig, PrunedForCausalLM, exist_ok=True)
    AutoModelForSeq2SeqLM.register(PrunedConfig, PrunedForSeq2SeqLM, exist_ok=True)


on_first_use(_register_models)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        # The configuration alone is needed to register; the models take transformers' larger half along.
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CapturedModel",
    "Pruned",
    "PrunedConfig",
    "PrunedForCausalLM",
    "PrunedForSeq2SeqLM",
    "analyze",
    "apply",
    "capture",
    "load_offloaded",
    "measure",
    "prune",
]
