"""Exporting without the exporters' own logging."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from ..base.compat import silent_export, silent_fake_tensors


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters log what the library itself reports; errors still arrive as exceptions."""
    from ..base.compat._transformers import EXPORTER_LOGGER

    names = (
        "torch.export",
        "torch._export",
        "torch.fx.experimental.symbolic_shapes",
        "torch._export.non_strict_utils",
        "transformers",
        EXPORTER_LOGGER,
    )
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        _set_levels(dict.fromkeys(names, logging.ERROR))
        with warnings.catch_warnings(), silent_export(), silent_fake_tensors():
            warnings.simplefilter("ignore")
            yield
    finally:
        _set_levels(levels)


def _set_levels(levels: dict[str, int]) -> None:
    """Set the levels of loggers. Each call of ``setLevel`` walks through all the loggers of the process, and
    one tells them of all changes.
    """
    for name, level in levels.items():
        logging.getLogger(name).level = level
    name, level = next(iter(levels.items()))
    logging.getLogger(name).setLevel(level)
