"""Ask for weights to be kept in files, for as long as a model is pruned."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import TracebackType

import psutil
import torch
from torch import nn

from ...errors import ArgumentError
from .._device import check_device
from .._storage import storage_of
from ._current import kept_in
from ._scratch import Scratch

#: bytes of weights that may be in memory at once, if nothing else is asked for
RESIDENT = 2**30


@contextmanager
def offload(
    folder: str | Path | None = None,
    *,
    resident: int = RESIDENT,
    device: torch.device | str | None = None,
) -> Iterator[Scratch]:
    """Keep weights in files while a model is pruned: those that are made inside, and those given to
    :func:`keep_weights`; and with them the activations of calibration batches that wait for others.

    The files are mapped into memory, so that a weight is read when it is used, and dropped where memory is
    short. They have no names: they go when the last tensor in them does, also if the process is killed.
    Tensors that were made inside, those of a result among them, stay usable afterwards. A process that is
    forked shares them: what it writes into a weight is seen by both. Only the thread that enters keeps
    weights in files.

    Args:
        folder: on a disk with room for about three times the weights, in their own precision, and for the
            activations; made if it is missing. ``None``: the system's folder for temporary files, which on
            some systems lies in memory.
        resident: bytes of weights that may be in memory at once, over and above what the operating system
            would drop by itself.
        device: an accelerator on which calibration batches run and repairs are solved, with the weights on it
            that are used just then. The model stays on the CPU, where it is captured and checked.
            ``None``: all on the CPU.

    Raises:
        ArgumentError: ``resident`` is not positive, or the device cannot be used.
        OffloadError: the folder cannot be written, or its disk is full.
    """
    if isinstance(resident, bool) or not isinstance(resident, int) or resident <= 0:
        raise ArgumentError(f"resident={resident!r} is no number of bytes; 2**30 is a gibibyte")
    found = torch.device("cpu") if device is None else check_device(device)
    scratch = Scratch(
        tempfile.gettempdir() if folder is None else folder, None if found.type == "cpu" else found
    )
    try:
        with kept_in(scratch), Watch(scratch, resident):
            yield scratch
    finally:
        scratch.remove_folders()


def keep_weights(model: nn.Module, scratch: Scratch) -> None:
    """Put the parameters and buffers of a model into files. One at a time is in memory twice.

    The tensors stay the objects that they are, so that optimisers, hooks and ties go on; only where their
    values lie is changed. Those that share memory with others without being the same (views of a buffer, say)
    stay where they are.

    Raises:
        ArgumentError: ``scratch`` is not what :func:`offload` gave.
        OffloadError: the disk is full.
    """
    if not isinstance(scratch, Scratch):
        raise ArgumentError(
            f"scratch is a {type(scratch).__name__}; pass what `with fasp_fx.offload() as scratch` gives"
        )
    tensors = list({id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}.values())
    shared = Counter(storage_of(tensor) for tensor in tensors)
    with torch.no_grad():
        for tensor in tensors:
            values = tensor.detach()
            if (
                shared[storage_of(tensor)] == 1
                and not tensor.is_inference()
                and (kept := scratch.keep(values)) is not values
            ):
                tensor.data = kept


# --- Keep the memory that mapped files take below a limit.


#: seconds between looks
_EVERY = 0.01


class Watch:
    """Looks again and again, on a thread of its own, how much of mapped files is in memory, and releases it
    beyond a limit.

    The operating system does the same where memory is short; this does it before, so that other programs keep
    theirs. Where it does not say how much of a process is mapped files, as Linux does, nothing is done.

    Args:
        resident: bytes of mapped files, beyond those of the libraries that are loaded when the watch begins.
    """

    def __init__(self, scratch: Scratch, resident: int) -> None:
        self._scratch, self._limit = scratch, resident
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="fasp_fx-offload", daemon=True)

    def __enter__(self) -> Watch:
        before = mapped_bytes()
        if before is not None:
            self._limit += before
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(_EVERY):
            if (mapped_bytes() or 0) > self._limit:
                self._scratch.release()


def mapped_bytes() -> int | None:
    """How many bytes of mapped files this process has in memory, where that can be known."""
    shared: int | None = getattr(psutil.Process().memory_info(), "shared", None)
    return shared
