"""How a pruned model reads what it is called with beside its tokens: masks, losses, positions, caches."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from fasp_fx.errors import ArgumentError

LEFT_OUT = -100
#: how positions follow from a mask ``[batch, tokens]``: one after the other, or counting tokens shown, where
#: those hidden before them stand at zero, or one before it
POSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "count": lambda mask: torch.arange(mask.shape[1], device=mask.device).expand(mask.shape),
    "mask": lambda mask: (mask.cumsum(-1) - 1).clamp(min=0),
    "mask and hidden": lambda mask: mask.cumsum(-1) * mask - 1,
}


def cross_entropy(logits: Tensor, labels: Tensor, items: Any = None) -> Tensor:
    """The loss of predicting each label from the logits at its place: the mean over those not left out, or
    their sum divided by ``items``.
    """
    total = functional.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten().to(logits.device),
        ignore_index=LEFT_OUT,
        reduction="mean" if items is None else "sum",
    )
    return total if items is None else total / items


def after_start(labels: Tensor, start: int | None, padding: int) -> Tensor:
    """Labels behind the token that begins an output; what the loss leaves out becomes padding."""
    moved = torch.cat(
        [torch.full_like(labels[:, :1], padding if start is None else start), labels[:, :-1]], 1
    )
    return moved.masked_fill(moved == LEFT_OUT, padding)


#: how a model predicts labels from logits: each from the one before it, or at its place
LOSSES: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "next": lambda logits, labels, items: cross_entropy(logits[:, :-1], labels[:, 1:], items),
    "same": cross_entropy,
}


def refuse(arguments: dict[str, Any], known: Container[str] = ()) -> None:
    """Refuse arguments that the programs do not take, unless they ask for nothing.

    Raises:
        ArgumentError: names the first.
    """
    for name, value in arguments.items():
        if name not in known and value is not None and value is not False:
            raise ArgumentError(
                f"argument '{name}' is not served by a pruned model, whose forward is a captured program;"
                " leave it out, or use the dense model"
            )


def checked_tokens(name: str, ids: Any) -> Tensor:
    """Token numbers ``[batch, tokens]``; anything else is refused.

    Raises:
        ArgumentError: names the argument.
    """
    is_whole = isinstance(ids, Tensor) and ids.dtype in (torch.int32, torch.int64)
    if not is_whole or ids.dim() != 2 or 0 in ids.shape:
        raise ArgumentError(
            f"{name} is {shown(ids)}; pass token numbers [batch, tokens], torch.int64, at least one token"
        )
    return ids


def shown(value: Any) -> str:
    """What was given, in few words."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return "missing" if value is None else f"a {type(value).__name__}"


def mask_of(name: str, mask: Tensor | None, batch: int, length: int, like: Tensor) -> Tensor:
    """A mask over ``length`` tokens, all shown by default.

    Raises:
        ArgumentError: it has another shape.
    """
    if mask is None:
        return torch.ones((batch, length), dtype=torch.long, device=like.device)
    if not isinstance(mask, Tensor) or mask.shape != (batch, length):
        raise ArgumentError(
            f"{name} is {shown(mask)}; it must cover every token, cached ones included, zero where one is"
            f" padding: [{batch}, {length}]"
        )
    return mask.to(torch.long)


def loss_of(way: str | None, logits: Tensor, labels: Tensor | None, items: Any) -> Tensor | None:
    """The loss, if there are labels.

    Args:
        way: a key of :data:`LOSSES`; ``None``: the original has a loss of its own.
        items: how many labels there are in all batches that the loss will be added up over; ``None``: the
            mean over these.

    Raises:
        ArgumentError: there is not one label for each token, or labels are not served.
    """
    if labels is None:
        return None
    if way is None:
        raise ArgumentError(
            "labels are not served: the original model has a loss of its own, or none; leave them out and"
            " compute it from the logits"
        )
    if not isinstance(labels, Tensor) or labels.shape != logits.shape[:2] or labels.is_floating_point():
        raise ArgumentError(
            f"labels is {shown(labels)}, the logits speak of {list(logits.shape[:2])} tokens; give one token"
            " number for each"
        )
    return LOSSES[way](logits, labels, items)


def check_outputs(config: Any) -> None:
    """Refuse a configuration that asks for outputs which the programs do not have.

    Raises:
        ArgumentError: names the first.
    """
    for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
        if getattr(config, name, False):
            raise ArgumentError(
                f"config.{name} is set, but a pruned model's program returns none; set model.config.{name} ="
                " False, or use the dense model"
            )


# --- Caches of transformers as named tensors, and back.


def opened(cache: Any, kind: type[Cache]) -> Any:
    """The caller's cache, or without one an empty cache that holds every token of every layer.

    Raises:
        ArgumentError: it is of another kind; names the kind.
    """
    if cache is None:
        return kind(DynamicCache(), DynamicCache()) if kind is EncoderDecoderCache else kind()
    is_double = isinstance(cache, EncoderDecoderCache)
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if is_double else [cache]
    layers = [type(layer) for part in parts for layer in getattr(part, "layers", ())]
    if not isinstance(cache, kind) or any(layer is not DynamicLayer for layer in layers):
        raise ArgumentError(
            f"cache is a {type(cache).__name__} of {', '.join(sorted({layer.__name__ for layer in layers}))};"
            f" a pruned model takes a {kind.__name__} that keeps every token of every layer: make it"
            " without a config, or pass none to begin with"
        )
    return cache


def read_cache(
    cache: Cache, sizes: Mapping[str, tuple[int, int]], batch: int, like: Tensor
) -> dict[str, Tensor]:
    """The tensors that a program takes, by name; those of a layer that holds nothing yet are empty.

    Args:
        sizes: heads and width of each, by names such as ``cache.0.keys`` or ``cache.cross.1.values``.
        batch: the number of sequences of this call.
        like: a tensor of the model's dtype and device.

    Raises:
        ArgumentError: the cache holds another number of sequences or heads, another width, dtype or device.
    """
    tensors: dict[str, Tensor] = {}
    for name, (heads, width) in sizes.items():
        part, number, kind = _place(cache, name)
        layer = part.layers[number] if number < len(part.layers) else None
        tensor = getattr(layer, kind) if layer is not None and layer.is_initialized else None
        if tensor is None or tensor.dim() != 4:
            # A layer that was made and never written holds a tensor without dimensions.
            tensor = torch.empty((batch, heads, 0, width), dtype=like.dtype, device=like.device)
        elif (
            (tensor.shape[0], tensor.shape[1], tensor.shape[3]) != (batch, heads, width)
            or tensor.dtype != like.dtype
            or tensor.device != like.device
        ):
            raise ArgumentError(
                f"{name} of the cache is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, this model"
                f" needs {like.dtype} [{batch}, {heads}, any, {width}] on {like.device}; give it a cache that"
                " it has written itself"
            )
        tensors[name] = tensor
    return tensors


def write_cache(cache: Cache, tensors: dict[str, Tensor]) -> None:
    """Put what a program returned into the cache, in place, as a model of transformers does."""
    for name, tensor in tensors.items():
        part, number, kind = _place(cache, name)
        part.layers += [DynamicLayer() for _ in range(len(part.layers), number + 1)]
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
