"""Tensors over mapped files, which the operating system reads when they are used and drops when memory is
short.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import tempfile
import threading
import weakref
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, OffloadError, first_line

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
        ArgumentError: the folder is no path.
        OffloadError: no file can be made there.
    """

    def __init__(self, folder: str | Path, device: torch.device | None = None) -> None:
        if not isinstance(folder, str | Path) or not str(folder) or "\0" in str(folder):
            raise ArgumentError(
                f"folder={folder!r} is no path; give a folder on a disk with room for the weights"
            )
        self.folder, self.device = Path(folder), device
        # Each with the address where it begins.
        self._maps: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()
        # They are released on a thread of their own.
        self._lock, self._making = (threading.Lock(), threading.Lock())
        self._last: mmap.mmap | None = None
        self._used = 0
        absolute = self.folder.absolute()
        self._made = [path for path in (absolute, *absolute.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise OffloadError(
                f"weights cannot be kept in '{self.folder}': {first_line(error)}; give another folder"
            ) from error

    def __len__(self) -> int:
        """How many files there are."""
        with self._lock:
            return len(self._maps)

    def remove_folders(self) -> None:
        """Remove the folders that were made for the files, as far as nothing else has come into them."""
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def keep(self, tensor: Tensor) -> Tensor:
        """A tensor of the same values, in a file if it is a dense one of the CPU, not small, and not there
        already; a parameter stays one.

        Raises:
            OffloadError: the disk is full.
        """
        held = tensor.detach()
        dense = (
            type(held) is Tensor
            and held.device.type == "cpu"
            and held.layout is torch.strided
            and not held.is_quantized
        )
        if not dense or held.numel() * held.element_size() < SMALLEST or self._holds(held):
            return tensor
        made = self._room(held)
        made.copy_(held)
        return (
            nn.Parameter(made, requires_grad=tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else made
        )

    def keep_storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """The memory of tensors on the CPU, copied into a file if it is not small and not there already.

        Raises:
            OffloadError: the disk is full.
        """
        if storage.nbytes() < SMALLEST or self._lies_within(storage):
            return storage
        made = self.empty((storage.nbytes(),), torch.uint8)
        made.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
        return made.untyped_storage()

    def empty(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor in a file, to be written.

        Raises:
            OffloadError: the disk is full.
        """
        return self._room(torch.empty(shape, dtype=dtype, device="meta"))

    def zeros(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of zeros, in a file if it is not small; nothing is written for it.

        Raises:
            OffloadError: the disk is full.
        """
        if math.prod(shape) * dtype.itemsize < SMALLEST:
            return torch.zeros(shape, dtype=dtype, device="cpu")
        return self.empty(shape, dtype)  # a new file holds zeros, and no room in one is given out twice

    def release(self) -> None:
        """Give back the memory that mapped values take; they are read again when they are used."""
        with self._lock:
            maps = list(self._maps)
        for held in maps:
            # Of a shared mapping, which writes what was changed: nothing is lost.
            held.madvise(mmap.MADV_DONTNEED)

    def _holds(self, tensor: Tensor) -> bool:
        """Whether a tensor has a storage of its own in one of the files."""
        storage = tensor.untyped_storage()
        return storage.nbytes() == tensor.numel() * tensor.element_size() and self._lies_within(storage)

    def _lies_within(self, storage: torch.UntypedStorage) -> bool:
        with self._lock:
            return any(start <= storage.data_ptr() < start + len(held) for held, start in self._maps.items())

    def _room(self, like: Tensor) -> Tensor:
        size = like.numel() * like.element_size()
        if not size:  # of a block that went as a whole, say
            return torch.empty(like.shape, dtype=like.dtype)
        with self._making:
            if self._last is None or self._used + size > len(self._last):
                self._last, self._used = self._mapped(max(size, FILE_BYTES)), 0
            # ``frombuffer`` keeps the mapping for as long as a tensor shares its storage
            made = torch.frombuffer(self._last, dtype=like.dtype, count=like.numel(), offset=self._used).view(
                like.shape
            )
            self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return made

    def _mapped(self, size: int) -> mmap.mmap:
        try:
            with tempfile.TemporaryFile(
                dir=self.folder
            ) as file:  # has no name, so that nothing is left behind
                _reserve(file.fileno(), size)
                made = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OffloadError(
                f"{size:,} bytes of weights do not fit '{self.folder}': {first_line(error)}; free space, or"
                " give another folder"
            ) from error
        with self._lock:
            self._maps[made] = torch.frombuffer(made, dtype=torch.uint8).data_ptr()
        return made


def _reserve(descriptor: int, size: int) -> None:
    """Take room on the disk: a mapping that finds none when it is written ends the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
