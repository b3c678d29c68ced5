"""Ways in which models of transformers count positions, move labels on to be read, and predict them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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


__all__ = ["LEFT_OUT", "LOSSES", "MOVES", "POSITIONS", "cross_entropy"]
