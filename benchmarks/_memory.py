"""Peak resident memory of a stretch of code (Linux)."""

from __future__ import annotations

import gc
import pathlib
from types import TracebackType


def _status(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


class Peak:
    """``with Peak() as peak: …`` then ``peak.bytes`` is the highest resident size inside, ``peak.before``
    that at its start.
    """

    bytes = 0
    before = 0

    def __enter__(self) -> Peak:
        gc.collect()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self.before = _status("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bytes = _status("VmHWM")
