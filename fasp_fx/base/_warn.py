"""Warnings that point at the caller's line, however deep in the library they arise, and no logs of others."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from ._undisturbed import logging_from
from .compat import silent_export, silent_fake_tensors

_PACKAGE = Path(__file__).parents[1]
#: the packages' own folders, which are linked into this one
_OWN = tuple(
    f"{folder}/" for folder in {_PACKAGE, *((_PACKAGE / name).resolve() for name in ("passes", "patterns"))}
)


#: the loggers of exporters
_EXPORTERS = (
    "torch.export",
    "torch._export",
    "torch.fx.experimental.symbolic_shapes",
    "torch._export.non_strict_utils",
    "transformers",
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
    with (
        logging_from(logging.ERROR, *_EXPORTERS),
        warnings.catch_warnings(action="ignore"),
        silent_export(),
        silent_fake_tensors(),
    ):
        yield
