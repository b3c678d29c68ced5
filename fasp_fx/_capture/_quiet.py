"""Exporting without the exporters' own logging."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from unittest import mock

import torch.export._trace


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters log what the library itself reports; errors still arrive as exceptions."""
    from transformers.exporters import exporter_dynamo

    names = (
        "torch.export",
        "torch._export",
        "torch.fx.experimental.symbolic_shapes",
        "torch._export.non_strict_utils",
        "transformers",
        exporter_dynamo.logger.name,
    )
    fake = "torch._subclasses.fake_tensor"  # logs as errors what it goes on to raise
    levels = {name: logging.getLogger(name).level for name in (*names, fake)}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger(fake).setLevel(logging.CRITICAL)
        # torch.export prints the graph it had when it failed, once for each attempt
        with warnings.catch_warnings(), mock.patch.object(torch.export._trace, "print", create=True):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
