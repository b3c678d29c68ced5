"""Which tensors share memory, and tensors without any."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def storage_of(value: object) -> object:
    """What tells whether two tensors share memory, also where they hold no values; for anything else,
    something that is equal to nothing.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return object()
    return value.untyped_storage()._cdata


def without_values(tensor: Tensor) -> Tensor:
    """A tensor of the same kind on the meta device."""
    empty = tensor.detach().to("meta")
    return (
        nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    )
