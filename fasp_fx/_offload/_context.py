"""Ask for weights to be kept in files, for as long as a model is pruned."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ArgumentError
from ._current import kept_in
from ._scratch import Scratch
from ._watch import Watch

#: bytes of weights that may be in memory at once, if nothing else is asked for
RESIDENT = 2**30


@contextmanager
def offload(folder: str | Path | None = None, *, resident: int = RESIDENT) -> Iterator[Scratch]:
    """Keep weights in files while a model is pruned: those that are made inside, and those given to :func:`keep_weights`.

    The files are mapped into memory, so that a weight is read when it is used, and dropped where memory is short. They have no names: they go when the
    last tensor in them does, also if the process is killed. Tensors that were made inside, those of a result among them, stay usable afterwards.

    Args:
        folder: on a disk with room for about three times the weights, in their own precision; made if it is missing. ``None``: the system's folder for
            temporary files, which on some systems lies in memory.
        resident: bytes of weights that may be in memory at once, over and above what the operating system would drop by itself.

    Raises:
        ArgumentError: ``resident`` is not positive.
        OffloadError: the folder cannot be written, or its disk is full.
    """
    if isinstance(resident, bool) or not isinstance(resident, int) or resident <= 0:
        raise ArgumentError(f"resident={resident!r} is no number of bytes; 2**30 is a gibibyte")
    scratch = Scratch(tempfile.gettempdir() if folder is None else folder)
    with kept_in(scratch), Watch(scratch, resident):
        yield scratch


def keep_weights(model: nn.Module, scratch: Scratch) -> None:
    """Put the parameters and buffers of a model into files, in place; tied ones stay tied. One at a time is in memory twice.

    Raises:
        OffloadError: the disk is full.
    """
    kept: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    if id(tensor) not in kept:
                        kept[id(tensor)] = scratch.keep(tensor)
                    held[name] = kept[id(tensor)]


__all__ = ["RESIDENT", "keep_weights", "offload"]
