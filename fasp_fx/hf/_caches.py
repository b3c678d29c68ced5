"""Caches of transformers as named tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from ..errors import ArgumentError


def opened(cache: Any, encoder_decoder: bool) -> Any:
    """The caller's cache, or without one an empty cache that holds every token of every layer.

    Raises:
        ArgumentError: it is of another kind; names the kind.
    """
    if cache is None:
        return EncoderDecoderCache(DynamicCache(), DynamicCache()) if encoder_decoder else DynamicCache()
    expected = EncoderDecoderCache if encoder_decoder else DynamicCache
    parts = [cache]
    if isinstance(cache, EncoderDecoderCache):
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    kinds = [type(layer) for part in parts for layer in getattr(part, "layers", ())]
    if not isinstance(cache, expected) or any(kind is not DynamicLayer for kind in kinds):
        raise ArgumentError(
            f"cache is a {type(cache).__name__} of {', '.join(sorted({kind.__name__ for kind in kinds}))}; a"
            f" pruned model takes a {expected.__name__} that keeps every token of every layer: make it"
            " without a config, or pass none to begin with"
        )
    return cache


def read(cache: Cache, sizes: Mapping[str, tuple[int, int]], batch: int, like: Tensor) -> dict[str, Tensor]:
    """The tensors that a program takes, by name; those of a layer that holds nothing yet are empty.

    Args:
        sizes: heads and width of each, by names such as ``cache.0.keys`` or ``cache.cross.1.values``.
        batch: the number of sequences of this call.
        like: a tensor of the model's dtype and device.

    Raises:
        ArgumentError: the cache holds another number of sequences or heads, another width, dtype or device.
    """
    found: dict[str, Tensor] = {}
    for name, (heads, width) in sizes.items():
        part, number, kind = _place(cache, name)
        layer = part.layers[number] if number < len(part.layers) else None
        held = getattr(layer, kind) if layer is not None and layer.is_initialized else None
        if held is None or held.dim() != 4:
            # A layer that was made and never written holds a tensor without dimensions.
            held = torch.empty((batch, heads, 0, width), dtype=like.dtype, device=like.device)
        if (
            (held.shape[0], held.shape[1], held.shape[3]) != (batch, heads, width)
            or held.dtype != like.dtype
            or held.device != like.device
        ):
            raise ArgumentError(
                f"{name} of the cache is {held.dtype} {list(held.shape)} on {held.device}, this model needs"
                f" {like.dtype} [{batch}, {heads}, any, {width}] on {like.device}; give it a cache that it"
                " has written itself"
            )
        found[name] = held
    return found


def write(cache: Cache, tensors: dict[str, Tensor]) -> None:
    """Put what a program returned into the cache, in place, as a model of transformers does."""
    for name, tensor in tensors.items():
        part, number, kind = _place(cache, name)
        while len(part.layers) <= number:
            part.layers.append(DynamicLayer())
        layer: Any = part.layers[number]
        if not layer.is_initialized:
            layer.lazy_initialization(tensor, tensor)
        setattr(layer, kind, tensor)
        if isinstance(cache, EncoderDecoderCache) and part is cache.cross_attention_cache:
            cache.is_updated[number] = True


def _place(cache: Any, name: str) -> tuple[Any, int, str]:
    path = name.split(".")
    part = {"self": "self_attention_cache", "cross": "cross_attention_cache"}.get(path[1])
    return (cache if part is None else getattr(cache, part)), int(path[-2]), path[-1]
