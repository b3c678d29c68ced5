"""Weights in files for as long as a model is pruned, and where tensors that are made on the way are kept."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard, TypeVar

import psutil
import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ._device import check_device
from ._scratch import Scratch
from ._tensors import storage_of
from .compat import pytree

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
