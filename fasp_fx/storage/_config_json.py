"""What can be said of a configuration of transformers before it is made: how many layers it asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

#: far more than any published model has, far fewer than takes forever to build
LAYERS = 4096
_NAMES = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)


def layer_counts(data: Any) -> Iterator[tuple[str, int]]:
    """The numbers of layers in a configuration and those within it, by the names that configurations of
    transformers give them.
    """
    if isinstance(data, dict):
        for name, value in data.items():
            if name in _NAMES and type(value) is int:
                yield name, value
            yield from layer_counts(value)
    elif isinstance(data, list):
        for item in data:
            yield from layer_counts(item)


__all__ = ["LAYERS", "layer_counts"]
