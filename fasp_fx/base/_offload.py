"""Weights in files for as long as a model is pruned, and where tensors that are made on the way are kept: in
mapped files, which the operating system reads when they are used and drops when memory is short.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import psutil
import torch
from torch import Tensor, nn

from fasp_fx.errors import OffloadError, first_line

from ._records import check_kind
from ._tensors import check_device, storage_of, with_values
from ._undisturbed import for_a_while
from .compat import pytree

#: files are this large, or as large as the tensor that needs more: each takes a file descriptor while a
#: tensor lies in it
FILE_BYTES = 2**28
#: smaller tensors stay in memory
SMALLEST = 2**16
#: tensors begin at multiples of it, as torch's kernels like it
_ALIGNMENT = 64


class Scratch:
    """Files in a folder that hold tensors, and have no name there: what no tensor uses is freed, whatever
    becomes of the process.

    Args:
        folder: on a disk with room for what is kept; made if it is missing.
        device: where calibration batches run; ``None``: on the CPU.

    Raises:
        OffloadError: no file can be made there.
    """

    def __init__(self, folder: str | Path, device: torch.device | None = None) -> None:
        self.folder, self.device = Path(folder), device
        # Each with the address where it begins.
        self._maps: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()
        # They are released on a thread of their own.
        self._lock, self._making = (threading.Lock(), threading.Lock())
        self._last: mmap.mmap | None = None
        self._used = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise OffloadError(
                f"weights cannot be kept in '{self.folder}': {first_line(error)}; give another folder"
            ) from error

    def keep(self, tensor: Tensor) -> Tensor:
        """A tensor of the same values, in a file if it is a dense one of the CPU, not small, and not there
        already; a parameter stays one.

        Raises:
            OffloadError: the disk is full.
        """
        values = tensor.detach()
        if (
            not _is_plain(values)
            or values.nbytes < SMALLEST
            # it has a storage of its own in one of the files
            or (
                values.untyped_storage().nbytes() == values.nbytes
                and self._lies_within(values.untyped_storage())
            )
        ):
            return tensor
        return with_values(tensor, self.empty(values.shape, values.dtype).copy_(values))

    def keep_storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """The memory of tensors on the CPU, copied into a file if it is not small and not there already.

        Raises:
            OffloadError: the disk is full.
        """
        if storage.nbytes() < SMALLEST or self._lies_within(storage):
            return storage
        kept = self.empty((storage.nbytes(),), torch.uint8)
        kept.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
        return kept.untyped_storage()

    def empty(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor in a file, to be written; until then it holds zeros.

        Raises:
            OffloadError: the disk is full.
        """
        count = math.prod(shape)
        if not count:  # of a block that went as a whole, say
            return torch.empty(shape, dtype=dtype, device="cpu")
        size = count * dtype.itemsize
        with self._making:
            if self._last is None or self._used + size > len(self._last):
                self._last, self._used = self._mapped(max(size, FILE_BYTES)), 0
            # ``frombuffer`` keeps the mapping for as long as a tensor shares its storage
            tensor = torch.frombuffer(self._last, dtype=dtype, count=count, offset=self._used).view(shape)
            self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return tensor

    def release(self) -> None:
        """Give back the memory that mapped values take; they are read again when they are used."""
        with self._lock:
            maps = list(self._maps)
        for mapping in maps:
            # Of a shared mapping, which writes what was changed: nothing is lost.
            mapping.madvise(mmap.MADV_DONTNEED)

    def _lies_within(self, storage: torch.UntypedStorage) -> bool:
        with self._lock:
            return any(
                start <= storage.data_ptr() < start + len(mapping) for mapping, start in self._maps.items()
            )

    def _mapped(self, size: int) -> mmap.mmap:
        try:
            with tempfile.TemporaryFile(
                dir=self.folder
            ) as file:  # has no name, so that nothing is left behind
                _reserve(file.fileno(), size)
                mapping = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OffloadError(
                f"{size:,} bytes of weights do not fit '{self.folder}': {first_line(error)}; free space, or"
                " give another folder"
            ) from error
        with self._lock:
            self._maps[mapping] = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
        return mapping


def _reserve(descriptor: int, size: int) -> None:
    """Take room on the disk: a mapping that finds none when it is written ends the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


# --- Where tensors are kept.

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
    if scratch is None or device.type != "cpu" or math.prod(shape) * dtype.itemsize < SMALLEST:
        return torch.zeros(shape, dtype=dtype, device=device)
    return scratch.empty(shape, dtype)  # a new file holds zeros, and no room in one is given out twice


def computing() -> torch.device | None:
    """Where calibration batches run while their model lies in files, if that is not the CPU."""
    scratch = _SCRATCH.get()
    return None if scratch is None else scratch.device


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
    scratch = _SCRATCH.get()
    if scratch is None:
        return dict(values)
    moved: dict[int, torch.UntypedStorage] = {}

    def move(tensor: Tensor) -> Tensor:
        # the way back needs it as it is
        if tensor.requires_grad or not _is_plain(tensor) or tensor.untyped_storage().data_ptr() in stay:
            return tensor
        address = tensor.untyped_storage().data_ptr()
        if address not in moved:
            moved[address] = scratch.keep_storage(tensor.untyped_storage())
        if moved[address].data_ptr() == address:
            return tensor
        return torch.empty(0, dtype=tensor.dtype).set_(
            moved[address], tensor.storage_offset(), tensor.shape, tensor.stride()
        )

    return {key: pytree.tree_map_only(Tensor, move, value) for key, value in values.items()}


def moved(values: Mapping[K, Any], device: torch.device) -> dict[K, Any]:
    """The same values on another device."""
    return {
        key: pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), value)
        for key, value in values.items()
    }


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
        ArgumentError: the device cannot be used.
        OffloadError: the folder cannot be written, or its disk is full.

    Examples:
        >>> with fasp_fx.offload(resident=2**20) as scratch:
        ...     in_files = fasp_fx.prune(captured, calibration=batches, sparsity=0.3)
        >>> in_files.plan.groups == result.plan.groups
        True
    """
    place = torch.device("cpu") if device is None else check_device(device)
    scratch = Scratch(
        tempfile.gettempdir() if folder is None else folder, None if place.type == "cpu" else place
    )
    with for_a_while(_SCRATCH.get, _SCRATCH.set), _watched(scratch, resident):
        _SCRATCH.set(scratch)
        yield scratch


def keep_weights(model: nn.Module, scratch: Scratch) -> None:
    """Put the parameters and buffers of a model into files. One at a time is in memory twice.

    The tensors stay the objects that they are, so that optimisers, hooks and ties go on; only where their
    values lie is changed. Those that share memory with others without being the same (views of a buffer, say)
    stay where they are.

    Raises:
        ArgumentError: ``scratch`` is not what :func:`offload` gave.
        OffloadError: the disk is full.

    Examples:
        >>> layer = nn.Linear(512, 512)
        >>> with fasp_fx.offload() as scratch:
        ...     fasp_fx.keep_weights(layer, scratch)
        >>> layer(torch.randn(2, 512)).shape
        torch.Size([2, 512])
    """
    check_kind("scratch", scratch, Scratch, "pass what `with fasp_fx.offload() as scratch` gives")
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


@contextmanager
def _watched(scratch: Scratch, resident: int) -> Iterator[None]:
    """Look again and again, on another thread, how much of mapped files is in memory, and release it beyond a
    limit.

    The operating system does the same where memory is short; this does it before, so that other programs keep
    theirs. Where it does not say how much of a process is mapped files, as Linux does, nothing is done.

    Args:
        resident: bytes of mapped files, beyond those of the libraries that are loaded by now.
    """
    most, over = (mapped_bytes() or math.inf) + resident, threading.Event()

    def look() -> None:
        while not over.wait(_EVERY):
            if (mapped_bytes() or 0) > most:
                scratch.release()

    thread = threading.Thread(target=look, name="fasp_fx-offload", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def mapped_bytes() -> int | None:
    """How many bytes of mapped files this process has in memory, where that can be known."""
    return getattr(psutil.Process().memory_info(), "shared", None)
