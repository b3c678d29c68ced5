"""Where tensors that are made on the way are kept: in memory, or wherever the caller asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

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


__all__ = ["computing", "current", "keep", "kept_in", "zeros"]
