"""Files of a folder that somebody else may have filled: looked at before they are read.

Reading a pipe waits for ever, reading a device never ends, and a file with holes is larger than the disk it
lies on. Links are followed, because the hub's cache is made of them, but what they lead to must be a file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from ..base._tolerable import tolerable
from ..errors import FaspError, StoreError, first_line

#: the graph of a hundred layers takes some ten million bytes, the plan of the largest published model some
#: thirty
JSON_BYTES = 2**27
#: of files that are shorter by nature
SHORTER = {
    "manifest.json": 2**22,
    "signature.json": 2**22,
    "config.json": 2**22,
    "generation_config.json": 2**20,
}
#: what the header of so many tensors takes
HEADER_BYTES = 2**25
#: a mixture of 256 experts in 61 layers, each in three weights of its own, has a third of it
TENSORS = 2**17
#: below this, holes do no harm
_SMALL = 2**24
#: bytes of an element, by its name in a safetensors file
_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
}
_SIZES |= {"I32": 4, "U32": 4, "F32": 4, "C64": 8, "I64": 8, "U64": 8, "F64": 8}


@contextlib.contextmanager
def opened(file: Path) -> Iterator[BufferedReader]:
    """Open a file for reading.

    Raises:
        StoreError: it is missing, is no file, may not be read, or is mostly holes.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # opening a device may already do something
            raise StoreError(
                f"{file.name} in '{file.parent}' is not a file; copy the folder again, or save the result"
                " again"
            )
        descriptor = os.open(
            file,
            os.O_RDONLY
            | getattr(os, "O_NONBLOCK", 0)
            | getattr(os, "O_CLOEXEC", 0)
            | getattr(os, "O_BINARY", 0),
        )
    except FileNotFoundError as error:
        raise StoreError(
            f"{file.name} is missing from '{file.parent}'; give the folder that save() wrote, complete"
        ) from error
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{file.name} cannot be read: {first_line(error)}; copy the folder again, or save the result"
            " again"
        ) from error
    with open(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(
                f"{file.name} in '{file.parent}' is not a file; copy the folder again, or save the result"
                " again"
            )
        held = getattr(found, "st_blocks", 0) * 512
        if found.st_size > _SMALL and 0 < held < found.st_size // 8:
            # Nothing is said by file systems that count no blocks.
            raise StoreError(
                f"{file.name} has {found.st_size:,} bytes, of which only {held:,} are on disk; copy the"
                " folder again, or save the result again"
            )
        yield stream


def size_of(file: Path) -> int:
    """The number of bytes of a file.

    Raises:
        StoreError: as :func:`opened`.
    """
    with opened(file) as stream:
        return os.fstat(stream.fileno()).st_size


def check_length(file: Path, size: int) -> int:
    """Refuse a file of JSON that is longer than any that is written; returns how long it may be.

    Raises:
        StoreError: says both.
    """
    most = SHORTER.get(file.name, JSON_BYTES)
    if size > most:
        raise StoreError(
            f"{file.name} has {size:,} bytes, and at most {most:,} are read; save the result again"
        )
    return most


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        StoreError: as :func:`opened`, or it is too long, or not UTF-8.
    """
    with opened(file) as stream:
        most = check_length(file, os.fstat(stream.fileno()).st_size)
        try:
            return stream.read(most + 1).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(
                f"{file.name} cannot be read: {first_line(error)}; save the result again"
            ) from error


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a safetensors file says of a tensor."""

    shape: tuple[int, ...]
    elements: int


def tensors_of(file: Path) -> dict[str, StoredTensor]:
    """The tensors that a safetensors file holds, by the header alone, which must account for every byte.

    Raises:
        StoreError: it is no such file.
    """
    with opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(HEADER_BYTES, size - 8):
            raise _unreadable(file, "its header has no sensible length")
        with parsing(file.name):
            header = json.loads(stream.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise _unreadable(file, "its header is no object")
    header.pop("__metadata__", None)
    if len(header) > TENSORS:
        raise _unreadable(file, f"it holds {len(header):,} tensors, and at most {TENSORS:,} are read")
    found, total = {}, 0
    for name, entry in header.items():
        try:
            shape, width = entry["shape"], _SIZES[entry["dtype"]]
            begin, end = entry["data_offsets"]
            if (
                not all(type(item) is int and item >= 0 for item in (*shape, begin, end))
                or len(shape) > DIMENSIONS
            ):
                raise ValueError(f"its shape is {shape!r:.80}")
            elements = math.prod(shape)
            if end - begin != elements * width:
                raise ValueError(f"{elements} elements take no {end - begin} bytes")
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(file, f"the entry of '{name}' is wrong ({first_line(error)})") from error
        found[name] = StoredTensor(tuple(shape), elements)
        total += end - begin
    if total != size - 8 - length:
        raise _unreadable(
            file, f"its tensors take {total:,} bytes, and it has {size - 8 - length:,} for them"
        )
    return found


#: what is written is nested a few dozen levels deep at most
DEPTH = 200
#: torch has no more
DIMENSIONS = 64


def _unreadable(file: Path, why: str) -> StoreError:
    return StoreError(f"'{file.name}' is not a readable safetensors file: {why}; save the result again")


def check_depth(data: Any, name: str) -> None:
    """Refuse lists and objects within one another deeper than any that is written, which would exhaust the
    stack of whoever reads them.

    Raises:
        StoreError: they are.
    """
    level = [data]
    for _ in range(DEPTH):
        level = [
            item
            for value in level
            if isinstance(value, (list, dict))
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise StoreError(f"{name} is nested deeper than {DEPTH} levels; save the result again")


@contextlib.contextmanager
def parsing(name: str) -> Iterator[None]:
    """Turn whatever a reader of foreign data trips over into an error that names the file; the cause stays
    with it.

    Torch, sympy and transformers read what they wrote themselves and raise anything at what they did not.

    Raises:
        StoreError: the block raised something that is not ours.
    """
    try:
        yield
    except FaspError:
        raise
    except tolerable(Exception) as error:
        shown = f"{type(error).__name__}: {first_line(error)}"
        raise StoreError(
            f"{name} is damaged or forged, it holds what save() never writes ({shown:.300}); save the result"
            " again"
        ) from error


__all__ = [
    "DIMENSIONS",
    "TENSORS",
    "StoredTensor",
    "check_depth",
    "check_length",
    "opened",
    "parsing",
    "read_text",
    "size_of",
    "tensors_of",
]
