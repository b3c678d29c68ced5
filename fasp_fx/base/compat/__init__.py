"""What the library uses of torch and transformers beyond their documented interfaces: every such name stands
in this package and nowhere else.

``tests/test_private_names.py`` holds those to what is expected of them that a release could change without a
word.
What imports transformers (``_transformers``) is imported where it is needed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.export._trace
from torch import nn
from torch._decomp import decomposition_table
from torch._decomp.decompositions import matmul as decomposed_matmul
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import TracingContext, tracing
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.export import ExportedProgram
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule, _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen, _PyTreeInfo as PyTreeInfo
from torch.fx.graph_module import (
    _USER_PRESERVED_ATTRIBUTES_KEY as PRESERVED,
    _assign_attr as assign_attr,
    _forward_from_src as forward_from_src,
)
from torch.fx.traceback import annotate as annotating, preserve_node_meta as annotated_nodes
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .._undisturbed import logging_from
from ._objects import (
    RECURRENT_LISTS,
    SIZE_FUNCTIONS,
    Symbols,
    asserted,
    bounds_of,
    codegen_of,
    conditions_on,
    count_assumptions,
    forward_pre_hooks,
    guards_of_module,
    hint_of,
    hooks_of,
    is_view,
    non_persistent_buffers,
    ranges_of,
    rename,
    schema_of,
    set_guards,
    settled_by,
    storage_id,
    trees_of,
    version_of,
    with_parts,
    written_by_hook,
)
from ._patches import (
    PATCHES,
    applied_functions,
    attributes_read,
    called_as,
    reading_gguf,
    refuse_new_guards,
    silent_export,
    traced_by,
    without_stack_traces,
)

#: the function that a graph of dynamo's calls where gradients are switched on or off
SET_GRAD = torch._C._set_grad_enabled


#: the logger of what fake tensors go on to raise
FAKE_LOGGER = "torch._subclasses.fake_tensor"


def silent_fake_tensors() -> contextlib.AbstractContextManager[None]:
    """Keep fake tensors from logging as an error what they go on to raise."""
    return logging_from(logging.CRITICAL, FAKE_LOGGER)


def compiled_when_called() -> contextlib.AbstractContextManager[None]:
    """Let what is traced compile its graph when it is first called, and not after each change of an
    exporter's.
    """
    return _use_lazy_graph_module(True)


def compile_graphs(module: nn.Module) -> None:
    """Compile what waits for its first call in a module, whose ``forward`` has no signature before."""
    for part in module.modules():
        if isinstance(part, LazyGraphModule):
            part.real_recompile()


#: says of sizes what has to be true, or raises a RuntimeError; what data decide, a program asserts
settle = torch._check
#: calls of operators inside are not intercepted by ``__torch_function__``, that of a mode included
without_overrides = torch._C.DisableTorchFunction


def is_composite(operator: OpOverload) -> bool:
    """Whether an operator is made of others, so that its schema need not say that it returns a view."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd"))


def is_transform(target: Any) -> bool:
    """Whether a call of a graph is a step of a transformation of ``torch.func`` (``vmap``, ``grad``), which
    changes what the calls after it mean.
    """
    return str(getattr(target, "__module__", "")).startswith("torch._functorch")


def take_guards(program: ExportedProgram, guards: Iterable[str]) -> None:
    """Give a program guards on the sizes of its inputs, in Python; by itself it has those that its symbols
    came with when it was made.
    """
    program._guards_code = list(guards)


def guards_of(program: ExportedProgram) -> tuple[str, ...]:
    """What a program assumes of the sizes of its inputs, in Python."""
    return tuple(program._guards_code)


__all__ = [
    "FAKE_LOGGER",
    "PATCHES",
    "PRESERVED",
    "RECURRENT_LISTS",
    "SET_GRAD",
    "SIZE_FUNCTIONS",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "InstructionTranslator",
    "LazyGraphModule",
    "OpOverload",
    "PyTreeCodeGen",
    "PyTreeInfo",
    "ShapeEnv",
    "Symbols",
    "TorchDispatchMode",
    "TracingContext",
    "annotated_nodes",
    "annotating",
    "aot_export_module",
    "applied_functions",
    "asserted",
    "assign_attr",
    "attributes_read",
    "bounds_of",
    "called_as",
    "codegen_of",
    "compile_graphs",
    "compiled_when_called",
    "conditions_on",
    "count_assumptions",
    "decomposed_matmul",
    "decomposition_table",
    "enable_python_dispatcher",
    "forward_from_src",
    "forward_pre_hooks",
    "free_unbacked_symbols",
    "guards_of",
    "guards_of_module",
    "hint_of",
    "hooks_of",
    "is_composite",
    "is_transform",
    "is_view",
    "lookup_backend",
    "non_persistent_buffers",
    "pytree",
    "ranges_of",
    "reading_gguf",
    "refuse_new_guards",
    "rename",
    "schema_of",
    "set_guards",
    "settled_by",
    "silent_export",
    "silent_fake_tensors",
    "storage_id",
    "take_guards",
    "traced_by",
    "tracing",
    "trees_of",
    "version_of",
    "with_parts",
    "without_overrides",
    "without_stack_traces",
    "written_by_hook",
]
