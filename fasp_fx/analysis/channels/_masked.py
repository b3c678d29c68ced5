"""Positions picked by a mask, whose number data decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...capturing._fx import arguments

_INDEX = torch.ops.aten.index.Tensor


def is_mask(given: Any) -> bool:
    """Whether a node gives truth values."""
    value = given.meta.get("val") if isinstance(given, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


def lone_mask(indices: Sequence[Any]) -> tuple[int, int] | None:
    """The first of the dimensions that a mask picks along and their number, where it is the only index."""
    places = [at for at, item in enumerate(indices) if item is not None]
    if len(places) != 1 or not is_mask(indices[places[0]]):
        return None
    return places[0], indices[places[0]].meta["val"].dim()


def picked(node: fx.Node, recorded: Any, source: Any = None) -> Any:
    """What a mask picks out of a tensor, as many as were recorded; ``recorded`` of other operators.

    Args:
        recorded: the result as it was captured, whose other sizes may have changed since.
        source: the tensor as it is now.
    """
    found = lone_mask(arguments(node)["indices"]) if node.target is _INDEX else None
    if found is None or not isinstance(source, Tensor) or not isinstance(recorded, Tensor):
        return recorded
    at, rank = found
    return recorded.new_empty((*source.shape[:at], recorded.shape[at], *source.shape[at + rank :]))


__all__ = ["is_mask", "lone_mask", "picked"]
