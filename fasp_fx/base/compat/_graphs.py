"""What graph modules keep for their caller, and what exporting one prints."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch.export._trace
import torch.fx.config
from torch import nn
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen
from torch.fx.graph import _PyTreeInfo as PyTreeInfo
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY as PRESERVED
from torch.fx.traceback import annotate as annotating
from torch.fx.traceback import preserve_node_meta as annotated_nodes


def silent_export() -> contextlib.AbstractContextManager[object]:
    """Keep ``torch.export`` from printing, once for each attempt, the graph it had when it failed."""
    return mock.patch.object(torch.export._trace, "print", create=True)


def compiled_when_called() -> contextlib.AbstractContextManager[None]:
    """Let what is traced compile its graph when it is first called, and not after each change of an
    exporter's.
    """
    return _use_lazy_graph_module(True)


def without_stack_traces() -> contextlib.AbstractContextManager[object]:
    """Let what is traced not look for the line of the model that made each node, which takes an eighth of a
    capture. Where torch cannot be told, it does.
    """
    if not hasattr(torch.fx.config, "do_not_emit_stack_traces"):
        return contextlib.nullcontext()
    return mock.patch.object(torch.fx.config, "do_not_emit_stack_traces", True)


def compile_graphs(module: nn.Module) -> None:
    """Compile what waits for its first call in a module, whose ``forward`` has no signature before."""
    for part in module.modules():
        if isinstance(part, LazyGraphModule):
            part.real_recompile()


__all__ = [
    "PRESERVED",
    "LazyGraphModule",
    "PyTreeCodeGen",
    "PyTreeInfo",
    "annotated_nodes",
    "annotating",
    "compile_graphs",
    "compiled_when_called",
    "silent_export",
    "without_stack_traces",
]
