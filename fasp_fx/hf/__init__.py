"""Pruned language models that generate, are saved and are fine-tuned as those of transformers.

:func:`prune` makes one; importing fasp_fx lets ``AutoModelForCausalLM`` and ``AutoModelForSeq2SeqLM`` load
it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._config import FIRST_USE, PrunedConfig

if TYPE_CHECKING:
    from ._generating import PrunedForCausalLM, PrunedForSeq2SeqLM
    from ._offloaded import load_offloaded
    from ._prune import CapturedModel, Pruned, analyze, apply, capture, convert, measure, prune

_HOMES = {
    **dict.fromkeys(
        ("CapturedModel", "Pruned", "analyze", "apply", "capture", "convert", "measure", "prune"), "._prune"
    ),
    "PrunedForCausalLM": "._generating",
    "PrunedForSeq2SeqLM": "._generating",
    "load_offloaded": "._offloaded",
}


# The models register themselves: importing them takes long, and only who has a configuration needs them.
FIRST_USE.append(lambda: import_module("._generating", __name__))


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
    "convert",
    "load_offloaded",
    "measure",
    "prune",
]
