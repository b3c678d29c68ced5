"""Where tensors that are made on the way are kept: in memory, or wherever the caller asked for."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from ..compat import pytree
from ._scratch import Scratch

_SCRATCH: ContextVar[Scratch | None] = ContextVar("fasp_fx_scratch", default=None)


def keep(tensor: Tensor) -> Tensor:
    """A tensor as large as a weight that will be needed later: in a file inside of :func:`fasp_fx.offload`,
    as it is elsewhere.
    """
    scratch = _SCRATCH.get()
    return tensor if scratch is None else scratch.keep(tensor)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that will be needed later, kept as :func:`keep` does."""
    scratch = _SCRATCH.get()
    if scratch is None or device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return scratch.zeros(shape, dtype)


def computing() -> torch.device | None:
    """Where calibration batches run while their model lies in files, if that is not the CPU."""
    scratch = _SCRATCH.get()
    return None if scratch is None else scratch.device


def current() -> Scratch | None:
    """The files that weights lie in here, if any."""
    return _SCRATCH.get()


@contextmanager
def kept_in(scratch: Scratch) -> Iterator[None]:
    """Let :func:`keep` put tensors there."""
    token = _SCRATCH.set(scratch)
    try:
        yield
    finally:
        _SCRATCH.reset(token)


# --- What a model computes, put into files between two places where it is needed.


K = TypeVar("K")


def keep_values(values: Mapping[K, Any], stay: Container[int] = ()) -> dict[K, Any]:
    """The same values, with their memory in files inside of :func:`fasp_fx.offload`.

    Sizes and strides stay, and tensors that share memory share it again, so that whatever is computed from
    them is the same to the bit.

    Args:
        values: trees of tensors.
        stay: what lies at one of these :func:`addresses` stays where it is: somebody else holds it, or writes
            into it.
    """
    scratch = current()
    if scratch is None:
        return dict(values)
    moved: dict[int, torch.UntypedStorage] = {}

    def move(tensor: Tensor) -> Tensor:
        if tensor.requires_grad or not _is_plain(tensor):  # the way back needs it as it is
            return tensor
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in stay:
            return tensor
        if address not in moved:
            moved[address] = scratch.keep_storage(storage)
        if moved[address].data_ptr() == address:
            return tensor
        made = torch.empty(0, dtype=tensor.dtype)
        return made.set_(moved[address], tensor.storage_offset(), tensor.shape, tensor.stride())

    return {key: pytree.tree_map_only(Tensor, move, value) for key, value in values.items()}


def moved(values: Mapping[K, Any], device: torch.device) -> dict[K, Any]:
    """The same values on another device. Sizes and strides stay, and tensors that share memory share it
    again.
    """
    memory: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
        if not address or tensor.device == device or tensor.is_conj() or tensor.is_neg():
            return tensor.to(device)
        if address not in memory:
            count = tensor.untyped_storage().nbytes() // tensor.element_size()
            memory[address] = tensor.as_strided((count,), (1,), 0).to(device)
        own = memory[address]
        if own.dtype != tensor.dtype:
            own = own.view(tensor.dtype)
        return own.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return {key: pytree.tree_map_only(Tensor, move, value) for key, value in values.items()}


def addresses(tensors: Iterable[Any]) -> set[int]:
    """Where the memory of tensors lies that :func:`keep_values` would move."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if _is_plain(tensor)}


def _is_plain(tensor: Any) -> TypeGuard[Tensor]:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
    )
