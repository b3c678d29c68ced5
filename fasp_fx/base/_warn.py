"""Warnings that point at the caller's line, however deep in the library they arise."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

_PACKAGE = Path(__file__).parent
#: the packages' own folders, which are linked into this one
_OWN = tuple(
    f"{folder}/" for folder in {_PACKAGE, *((_PACKAGE / name).resolve() for name in ("passes", "patterns"))}
)


def warn(message: str, category: type[Warning]) -> None:
    """Warn as of the first line outside of the library that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


__all__ = ["warn"]
