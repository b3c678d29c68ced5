"""Exporting without the exporters' own logging."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from .._compat import FAKE_LOGGER, silent_export


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters log what the library itself reports; errors still arrive as exceptions."""
    from .._compat._transformers import EXPORTER_LOGGER

    names = (
        "torch.export",
        "torch._export",
        "torch.fx.experimental.symbolic_shapes",
        "torch._export.non_strict_utils",
        "transformers",
        EXPORTER_LOGGER,
    )
    levels = {name: logging.getLogger(name).level for name in (*names, FAKE_LOGGER)}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger(FAKE_LOGGER).setLevel(logging.CRITICAL)  # logs as errors what it goes on to raise
        with warnings.catch_warnings(), silent_export():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
