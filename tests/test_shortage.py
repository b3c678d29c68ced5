"""A shortage of memory or disk, or an interrupt, is never taken for anything else."""

from __future__ import annotations

import errno
import functools
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from fasp_fx._tolerable import short_of_memory, tolerable
from fasp_fx.errors import OffloadError, TrainingMemoryError


def _raise(error: BaseException) -> Callable[[], Any]:
    def run() -> None:
        raise error

    return run


def _wrapped(error: BaseException, explicit: bool = True) -> Callable[[], Any]:
    def run() -> None:
        try:
            raise error
        except BaseException as caught:
            if explicit:
                raise OffloadError("it did not work") from caught
            raise ValueError("it did not work") from None

    return run


def _full(number: int) -> OSError:
    return OSError(number, os.strerror(number))


SHORT_OF_MEMORY = {
    "the allocator of the CPU": lambda: torch.empty(1 << 46),
    "Python": lambda: bytearray(1 << 60),
    "a device": _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")),
    "a library of a device": _raise(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x")),
    "the system": _raise(_full(errno.ENOMEM)),
    "training": _raise(TrainingMemoryError("it takes 3 GiB")),
    "from it": _wrapped(MemoryError()),
    "after it": _wrapped(torch.OutOfMemoryError("CUDA out of memory"), explicit=False),
}
SHORT_OF_FILES = {
    "a disk": _raise(_full(errno.ENOSPC)),
    "a quota": _wrapped(_full(errno.EDQUOT)),
    "descriptors": _raise(_full(errno.EMFILE)),
    "a writer": _raise(SafetensorError("Error while serializing: No space left on device (os error 28)")),
}
NOT_SHORT = {
    "a graph": _raise(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")),
    "no file": _raise(FileNotFoundError(errno.ENOENT, "No such file")),
    "from no file": _wrapped(FileNotFoundError(errno.ENOENT, "No such file")),
    "no text": _raise(ValueError(3)),
}


def _caught(run: Callable[[], Any]) -> str:
    try:
        try:
            run()
        except tolerable(ValueError, RuntimeError, OSError, OffloadError):
            return "tolerated"
    except short_of_memory():
        return "memory"
    except Exception:
        return "passed"
    return "nothing"


@pytest.mark.parametrize(
    ("expected", "run"),
    [
        *[pytest.param("memory", run, id=f"memory: {name}") for name, run in SHORT_OF_MEMORY.items()],
        *[pytest.param("passed", run, id=f"files: {name}") for name, run in SHORT_OF_FILES.items()],
        *[pytest.param("tolerated", run, id=f"not short: {name}") for name, run in NOT_SHORT.items()],
    ],
)
def test_a_shortage_is_told_from_other_errors(expected: str, run: Callable[[], Any]) -> None:
    assert _caught(run) == expected


def test_what_the_caller_was_handling_before_says_nothing() -> None:
    """A caller may try again with less after a shortage, and what is raised then may be tolerated."""
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    except torch.OutOfMemoryError:
        assert _caught(NOT_SHORT["a graph"]) == "tolerated"


class _Handler:
    def __call__(self, *args: Any) -> None:
        raise RuntimeError("time is up")

    def method(self, *args: Any) -> None:
        raise RuntimeError("time is up")


@pytest.mark.parametrize(
    "handler", [_Handler(), _Handler().method, lambda *args: _Handler()(), functools.partial(_Handler(), 1)]
)
@pytest.mark.parametrize("wrap", [False, True])
def test_what_a_handler_of_a_signal_raises_is_not_tolerated(handler: Any, wrap: bool) -> None:
    def interrupted() -> None:
        try:
            signal.raise_signal(signal.SIGALRM)
        except RuntimeError as error:
            if not wrap:
                raise
            raise ValueError(str(error)) from error

    before = signal.signal(signal.SIGALRM, handler)
    try:
        assert _caught(interrupted) == "passed"
        assert _caught(_raise(RuntimeError("time is up"))) == "tolerated"
    finally:
        signal.signal(signal.SIGALRM, before)
