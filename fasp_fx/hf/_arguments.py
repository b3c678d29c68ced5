"""How a pruned model reads what it is called with beside its tokens: checks, masks, losses, positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ArgumentError, first_line

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
    first = torch.full_like(labels[:, :1], padding if start is None else start)
    moved = torch.cat([first, labels[:, :-1]], 1)
    return moved.masked_fill(moved == LEFT_OUT, padding)


def after_last(labels: Tensor, start: int | None, padding: int) -> Tensor:
    """Labels behind the last of them that is no padding (a language's token, in MBart)."""
    shown = labels.masked_fill(labels == LEFT_OUT, padding)
    last = shown.gather(1, (shown != padding).sum(1, keepdim=True).sub(1).clamp(min=0))
    return torch.cat([last, shown[:, :-1]], 1)


#: how a model makes tokens of its decoder from labels
MOVES: dict[str, Callable[[Tensor, int | None, int], Tensor]] = {"start": after_start, "last": after_last}
#: how a model predicts labels from logits: each from the one before it, or at its place
LOSSES: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "next": lambda logits, labels, items: cross_entropy(logits[:, :-1], labels[:, 1:], items),
    "same": cross_entropy,
}


_NUMBERS = (torch.int32, torch.int64)


def refuse(arguments: dict[str, Any], known: tuple[str, ...] = ()) -> None:
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
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in _NUMBERS or 0 in ids.shape:
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
    """The loss, if there are labels; a label that is no token of the vocabulary is refused where the device
    says so.

    Args:
        way: a key of :data:`LOSSES`; ``None``: the original has a loss of its own.
        items: how many labels there are in all batches that the loss will be added up over; ``None``: the
            mean over these.

    Raises:
        ArgumentError: a label is neither a token number nor -100, or labels are not served.
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
