"""Which exceptions may be taken for "this did not work", and which are of the machine or of the caller.

Both functions stand behind ``except``, where Python calls them when something is raised.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import signal
import sys
import traceback
from types import CodeType, FrameType, FunctionType
from typing import TypeVar

E = TypeVar("E", bound=Exception)

#: what the system says where memory, or room on a disk or for open files, is short
_MEMORY, _FILES = (
    {errno.ENOMEM},
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE},
)
#: how torch says in a plain RuntimeError that memory is short: its allocator of the CPU, drivers and
#: libraries of devices
_TORCH = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|(error:|backend) out of memory"
    r"|_ALLOC(ATION)?_FAILED|std::bad_alloc"
)


def tolerable(*kinds: type[E]) -> tuple[type[E], ...]:
    """The kinds of exceptions to catch where one is taken for "this did not work"; none of them if what is
    raised says nothing of what was tried, and so has to reach the caller:

    * a shortage of memory or disk, whichever class it comes in;
    * what a handler of a signal raises, a timer's say: it interrupts whatever runs.

    What was raised because of these, or while they were handled, counts as they do. ::

        try:
            found = run(program)
        except tolerable(Exception) as error:
            return f"does not run: {error}"
    """
    raised = _raised(sys._getframe(1))
    return () if any(_is_short(error, _MEMORY | _FILES) or _interrupts(error) for error in raised) else kinds


def short_of_memory() -> tuple[type[Exception], ...]:
    """What to catch where smaller pieces may fit: anything, if memory is short, the host's or a device's;
    nothing else.
    """
    return (Exception,) if any(_is_short(error, _MEMORY) for error in _raised(sys._getframe(1))) else ()


def _raised(catching: FrameType) -> list[BaseException]:
    """What is raised where a frame may catch it, and what that was raised from or after; without what the
    frame's own callers were handling when they called it.
    """
    callers = {caller for caller, _ in traceback.walk_stack(catching)} - {catching}
    errors: list[BaseException] = []
    waiting = [sys.exception()]
    while waiting:
        error = waiting.pop()
        if error is None or any(error is known for known in errors):
            continue
        errors.append(error)
        waiting.append(error.__cause__)
        # A traceback begins in the frame that caught what was raised.
        begun = getattr(error.__context__, "__traceback__", None)
        if begun is None or begun.tb_frame not in callers:
            waiting.append(error.__context__)
    return errors


def _is_short(error: BaseException, numbers: set[int]) -> bool:
    """Whether an exception itself is of something short: by its class, by a number of the system's, or by
    what torch says; other words prove nothing, such as those of a model's own exceptions.
    """
    torch = sys.modules.get("torch")  # which need not be there yet
    if isinstance(error, (MemoryError, *([torch.OutOfMemoryError] if torch else []))):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in numbers
    # Not str(error), which runs code of the class.
    text = " ".join(part for part in error.args if isinstance(part, str))
    # As Rust writes numbers, and as torch does.
    said = [form for n in numbers for form in (f"(os error {n})", f"{os.strerror(n)} ({n})")]
    is_torchs = type(error).__name__ in ("RuntimeError", "AcceleratorError")
    return any(form in text for form in said) or bool(is_torchs and _TORCH.search(text))


def _interrupts(error: BaseException) -> bool:
    """Whether an exception comes out of a handler of a signal."""
    ran = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    return any(_code(signal.getsignal(number)) in ran for number in signal.valid_signals())


def _code(handler: object) -> CodeType | None:
    """The code that a handler of a signal runs; ``None`` if there is none of Python."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    function = getattr(handler, "__func__", handler)
    is_object = callable(function) and not isinstance(function, FunctionType)
    return getattr(type(function).__call__ if is_object else function, "__code__", None)
