"""Tensors without data, which stand for those of a program while it is read."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

#: the logger of what fake tensors go on to raise
FAKE_LOGGER = "torch._subclasses.fake_tensor"


@contextlib.contextmanager
def silent_fake_tensors() -> Iterator[None]:
    """Keep fake tensors from logging as an error what they go on to raise."""
    logger = logging.getLogger(FAKE_LOGGER)

    def passes(record: logging.LogRecord) -> bool:  # a level would be told to all loggers of the process
        return record.levelno >= logging.CRITICAL

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


def without_fake_cache() -> contextlib.AbstractContextManager[None]:
    """Trace without torch's cache of what operators made of fake tensors."""
    return torch._dynamo.config.patch(fake_tensor_cache_enabled=False)


def is_of_fake_cache(error: BaseException) -> bool:
    """Whether it was that cache that raised an error, and no operator."""
    return any(frame.name == "_make_cache_entry" for frame in traceback.extract_tb(error.__traceback__))


__all__ = [
    "FAKE_LOGGER",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "enable_python_dispatcher",
    "is_of_fake_cache",
    "silent_fake_tensors",
    "without_fake_cache",
]
