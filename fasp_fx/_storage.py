"""Which tensors share memory."""

from __future__ import annotations

import torch
from torch import Tensor


def storage_of(value: object) -> object:
    """What tells whether two tensors share memory, also where they hold no values; for anything else,
    something that is equal to nothing.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return object()
    return value.untyped_storage()._cdata


__all__ = ["storage_of"]
