"""Memory that is short at one place of a run, the n-th time that something takes some, or a disk that is full
from there on.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

#: what is said where something is short, in capitals so that nothing else says it
_MEMORY, _DISK = "CUDA OUT OF MEMORY", os.strerror(errno.ENOSPC)


def _plain() -> Exception:
    try:
        torch.empty(1 << 46)
    except RuntimeError as error:
        return error.with_traceback(None)
    raise AssertionError("there is memory for everything")


#: what is raised, by kind; how each is told from other errors
RAISED: dict[str, Callable[[], Exception]] = {
    "device": lambda: torch.OutOfMemoryError(f"{_MEMORY}: tried to allocate 3.00 GiB"),
    "host": _plain,
    "disk": lambda: OSError(errno.ENOSPC, _DISK),
}
WORDS = (_MEMORY, "can't allocate memory", _DISK)


@dataclass
class Places:
    """Counts the places where something is taken, and raises at one of them.

    Attributes:
        kind: of the shortage.
        at: the number of the place, from 1; 0: it is short nowhere.
        count: how many places there were.
    """

    kind: str
    at: int = 0
    count: int = 0

    def take(self, raised: Callable[[], Exception] | None = None) -> None:
        self.count += 1
        if self.count == self.at or (self.kind == "disk" and self.count > self.at > 0):
            raise (raised or RAISED[self.kind])()


class _Allocations(TorchDispatchMode):
    """Every tensor with values of its own is such a place."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(isinstance(one, FakeTensor) for one in torch.utils._pytree.tree_leaves((args, made))):
            return made
        results = made if isinstance(made, (list, tuple)) else [made]
        for one, said in zip(results, func._schema.returns, strict=False):
            if (
                isinstance(one, Tensor)
                and said.alias_info is None
                and one.device.type != "meta"
                and one.numel()
            ):
                self.places.take()
        return made


_WRITING: list[Places] = []
#: what writes without opening a file for it, by the name of the event
_MAKING = {"os.mkdir", "os.rename", "tempfile.mkdtemp", "tempfile.mkstemp", "shutil.copyfile"}


def _hook(event: str, given: tuple[Any, ...]) -> None:
    if not _WRITING:
        return
    if event == "open":
        path, _, flags = given
        if isinstance(path, int) or not isinstance(flags, int) or str(path) == os.devnull:
            return
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _WRITING[-1].take()
    elif event in _MAKING:
        _WRITING[-1].take()


_HOOKED: list[bool] = []


@contextmanager
def _full_disk(places: Places) -> Iterator[None]:
    """Every file that is opened for writing, made or moved is such a place."""
    if not _HOOKED:  # a hook cannot be taken away
        sys.addaudithook(_hook)
        _HOOKED.append(True)
    original = safetensors.torch.serialize_file  # which opens files without a word

    def serialize(*args: Any, **kwargs: Any) -> Any:
        places.take(lambda: SafetensorError(f"Error while serializing: I/O error: {_DISK} (os error 28)"))
        return original(*args, **kwargs)

    _WRITING.append(places)
    try:
        with mock.patch.object(safetensors.torch, "serialize_file", serialize):
            yield
    finally:
        _WRITING.pop()


@contextmanager
def short(places: Places) -> Iterator[None]:
    """Inside, what is of the kind of the places is short at one of them."""
    with _full_disk(places) if places.kind == "disk" else _Allocations(places):
        yield


def says_so(raised: BaseException | None) -> bool:
    """Whether an error names a shortage, itself or by what it was raised from."""
    waiting, seen = [raised], set[int]()
    while waiting:
        error = waiting.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            if any(word in str(error) for word in WORDS):
                return True
            waiting += [error.__cause__, error.__context__]
    return False


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        result: what it returned, if it did.
        error: what it raised.
        said: its warnings.
        places: how many it came by.
    """

    result: Any = None
    error: BaseException | None = None
    said: list[str] = field(default_factory=list)
    places: int = 0


def tried(run: Callable[[], Any], kind: str, at: int = 0) -> Outcome:
    """Run something with a shortage at one place."""
    places, found = Places(kind, at), Outcome()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with short(places):
                found.result = run()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            found.error = error
    found.said = sorted({f"{one.category.__name__}: {one.message}" for one in caught})
    found.places = places.count
    return found
