"""What graph modules keep for their caller, and what exporting one prints."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch.export._trace
from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen
from torch.fx.graph import _PyTreeInfo as PyTreeInfo
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY as PRESERVED


def silent_export() -> contextlib.AbstractContextManager[object]:
    """Keep ``torch.export`` from printing, once for each attempt, the graph it had when it failed."""
    return mock.patch.object(torch.export._trace, "print", create=True)


__all__ = ["PRESERVED", "PyTreeCodeGen", "PyTreeInfo", "silent_export"]
