"""Keep the memory that mapped files take below a limit."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

from ._scratch import Scratch

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


__all__ = ["Watch", "mapped_bytes"]
