"""Checks of the arguments that a pruned model's forward is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, first_line
from ._labels import LOSSES

_NUMBERS = (torch.int32, torch.int64)
#: arguments of transformers' models that a program does not take, and the values that ask for nothing
_IDLE = {
    "output_attentions": False,
    "output_hidden_states": False,
    "inputs_embeds": None,
    "token_type_ids": None,
    "decoder_inputs_embeds": None,
}


def refuse(arguments: dict[str, Any], known: tuple[str, ...] = ()) -> None:
    """Refuse arguments that the programs do not take, unless they ask for nothing.

    Raises:
        ArgumentError: names the first.
    """
    for name, value in arguments.items():
        if name in known or value is None or (name in _IDLE and value == _IDLE[name]):
            continue
        raise ArgumentError(
            f"argument '{name}' is not served by a pruned model, whose forward is a captured program; leave"
            " it out, or use the dense model"
        )


def check_tokens(name: str, ids: Any) -> None:
    """Refuse anything but token numbers ``[batch, tokens]``.

    Raises:
        ArgumentError: names the argument.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in _NUMBERS or 0 in ids.shape:
        raise ArgumentError(
            f"{name} is {shown(ids)}; pass token numbers [batch, tokens], torch.int64, at least one token"
        )


def check_numbers(name: str, numbers: Any) -> None:
    """Refuse anything but a tensor of integers.

    Raises:
        ArgumentError: names the argument.
    """
    if not isinstance(numbers, Tensor) or numbers.dtype not in _NUMBERS:
        raise ArgumentError(f"{name} is {shown(numbers)}; pass a tensor of integers, torch.int64")


def shown(value: Any) -> str:
    """What was given, in few words."""
    return (
        f"{value.dtype} {list(value.shape)}"
        if isinstance(value, Tensor)
        else "missing"
        if value is None
        else f"a {type(value).__name__}"
    )


def mask_of(name: str, mask: Tensor | None, batch: int, length: int, like: Tensor) -> Tensor:
    """A mask over ``length`` tokens, all shown by default.

    Raises:
        ArgumentError: it has another shape.
    """
    if mask is None:
        return torch.ones((batch, length), dtype=torch.long, device=like.device)
    if not isinstance(mask, Tensor):
        raise ArgumentError(
            f"{name} is {shown(mask)}; pass a tensor [{batch}, {length}], zero where a token is padding"
        )
    if mask.shape != (batch, length):
        raise ArgumentError(
            f"{name} has the shape {list(mask.shape)}; it must cover every token, cached ones included:"
            f" [{batch}, {length}]"
        )
    return mask.to(torch.long)


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuse labels that are not one for each token that the logits speak of.

    Raises:
        ArgumentError: gives both shapes.
    """
    check_numbers("labels", labels)
    if labels.shape != logits.shape[:2]:
        raise ArgumentError(
            f"labels have the shape {list(labels.shape)}, the logits speak of {list(logits.shape[:2])}"
            " tokens; give one label per token"
        )


def loss_of(way: str | None, logits: Tensor, labels: Tensor, items: Any) -> Tensor:
    """The loss; a label that is no token of the vocabulary is refused where the device says so.

    Args:
        way: a key of :data:`LOSSES`; ``None``: the original has a loss of its own.
        items: how many labels there are in all batches that the loss will be added up over; ``None``: the
            mean over these.

    Raises:
        ArgumentError: a label is neither a token number nor -100, or labels are not served.
    """
    if way is None:
        raise ArgumentError(
            "labels are not served: the original model has a loss of its own, or none; leave them out and"
            " compute it from the logits"
        )
    check_labels(labels, logits)
    try:
        return LOSSES[way](logits, labels, items)
    except IndexError as error:
        raise ArgumentError(
            f"labels hold a number that is no token: {first_line(error)}; -100 leaves a token out"
        ) from error


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


__all__ = [
    "check_labels",
    "check_numbers",
    "check_outputs",
    "check_tokens",
    "loss_of",
    "mask_of",
    "refuse",
    "shown",
]
