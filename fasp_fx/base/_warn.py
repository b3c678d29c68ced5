"""Warnings that point at the caller's line, however deep in the library they arise."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from .compat import silent_export, silent_fake_tensors

_PACKAGE = Path(__file__).parents[1]
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


# --- Exporting without the exporters' own logging.


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters log what the library itself reports; errors still arrive as exceptions."""
    loggers = [
        logging.getLogger(name)
        for name in (
            "torch.export",
            "torch._export",
            "torch.fx.experimental.symbolic_shapes",
            "torch._export.non_strict_utils",
            "transformers",
        )
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(action="ignore"), silent_export(), silent_fake_tensors():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
