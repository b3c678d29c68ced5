"""The transformers zoo: small random models of every kind, as tables of ``model class: what differs from the
small defaults``.

A second row of a class has a key of its own and says ``model``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers.integrations import moe

from ._entry import Draw, Entry, constant
from ._shrink import shrink
from ._transformers_multi import MULTIMODAL
from ._transformers_sight import AUDIO, VISION
from ._transformers_text import DECODERS, ENCODER_DECODERS, ENCODERS, MIXTURES, STATE_SPACES

TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "decoder": DECODERS,
    "moe": MIXTURES,
    "state space": STATE_SPACES,
    "encoder": ENCODERS,
    "encoder-decoder": ENCODER_DECODERS,
    "vision": VISION,
    "audio": AUDIO,
    "multimodal": MULTIMODAL,
}


def entries() -> list[Entry]:
    """Every model of the zoo, named by its model type."""
    found = [_entry(kind, name, dict(row)) for kind, table in TABLES.items() for name, row in table.items()]
    names = [entry.name for entry in found]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
    return found


def _entry(kind: str, name: str, row: dict[str, Any]) -> Entry:
    """A row's ``model``, ``inputs``, ``name``, ``config``, ``double`` and ``batches`` belong to the entry,
    the rest to the configuration.
    """
    model = getattr(transformers, row.pop("model", name))
    inputs: dict[str, Draw] = dict(row.pop("inputs"))
    double = row.pop("double", kind == "moe")
    batches = row.pop("batches", (2, 3))
    config = getattr(transformers, row.pop("config")) if "config" in row else model.config_class
    title = row.pop("name", config.model_type)
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters:
        inputs.setdefault("use_cache", constant(False))

    def make() -> nn.Module:
        if double:
            # what a capture takes in any dtype, since the grouped product itself has no float64 kernel
            moe._can_use_grouped_mm = lambda *arguments: False
        made = model(shrink(config, row))
        return made.to(torch.float64) if double else made

    return Entry(title, kind, make, keywords=inputs, double=double, batches=batches)
