"""Checks of the arguments that a pruned model's forward is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError

#: arguments of transformers' models that a program does not take, and the values that ask for nothing
_IDLE = {"output_attentions": False, "output_hidden_states": False, "inputs_embeds": None, "token_type_ids": None, "decoder_inputs_embeds": None}


def refuse(arguments: dict[str, Any], known: tuple[str, ...] = ()) -> None:
    """Refuse arguments that the programs do not take, unless they ask for nothing.

    Raises:
        ArgumentError: names the first.
    """
    for name, value in arguments.items():
        if name in known or value is None or (name in _IDLE and value == _IDLE[name]):
            continue
        remedy = "pass 'cache'" if name == "past_key_values" else "leave it out, or use the dense model"
        raise ArgumentError(f"argument '{name}' is not served by a pruned model, whose forward is a captured program; {remedy}")


def check_tokens(name: str, ids: Any) -> None:
    """Refuse anything but token numbers ``[batch, tokens]``.

    Raises:
        ArgumentError: names the argument.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or 0 in ids.shape:
        shown = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ArgumentError(f"{name} is {shown}; pass token numbers [batch, tokens], at least one token")


def mask_of(name: str, mask: Tensor | None, batch: int, length: int, like: Tensor) -> Tensor:
    """A mask over ``length`` tokens, all shown by default.

    Raises:
        ArgumentError: it has another shape.
    """
    if mask is None:
        return torch.ones((batch, length), dtype=torch.long, device=like.device)
    if mask.shape != (batch, length):
        raise ArgumentError(f"{name} has the shape {list(mask.shape)}; it must cover every token, cached ones included: [{batch}, {length}]")
    return mask.to(torch.long)


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuse labels that are not one for each token that the logits speak of.

    Raises:
        ArgumentError: gives both shapes.
    """
    if labels.shape != logits.shape[:2]:
        raise ArgumentError(f"labels have the shape {list(labels.shape)}, the logits speak of {list(logits.shape[:2])} tokens; give one label per token")


__all__ = ["check_labels", "check_tokens", "mask_of", "refuse"]
