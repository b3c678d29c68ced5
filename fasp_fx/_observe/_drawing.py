"""Random numbers of a model, the same each time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .._program import Program


@contextlib.contextmanager
def drawing_alike(program: Program) -> Iterator[None]:
    """Random numbers that a model draws (for dropout that is always on, say) start from zero inside, so that
    the same is chosen each time.

    Those of the caller go on as if nothing had happened.
    """
    devices = {tensor.device for tensor in program.weights().values() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(0)
        yield


__all__ = ["drawing_alike"]
