"""What the library uses of torch and transformers beyond their documented interfaces: every such name stands
in this package and nowhere else.

``tests/test_compat.py`` holds each name to what is expected of it, so that a release that moves one fails
there, in words, and not in the midst of a model. The modules that import much (``_dynamo``, ``_serde``,
``_transformers``) are imported where they are needed.
"""

from torch.utils import _pytree as pytree

from ._autograd import is_backward
from ._fake import (
    FAKE_LOGGER,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    enable_python_dispatcher,
    is_of_fake_cache,
    silent_fake_tensors,
    without_fake_cache,
)
from ._graphs import (
    PRESERVED,
    LazyGraphModule,
    PyTreeCodeGen,
    PyTreeInfo,
    annotated_nodes,
    annotating,
    compile_graphs,
    compiled_when_called,
    silent_export,
    without_stack_traces,
)
from ._operators import (
    HigherOrderOperator,
    OpOverload,
    TorchDispatchMode,
    composites_read_once,
    decomposition_table,
    is_composite,
    is_transform,
    traced_by,
)
from ._sizes import (
    ShapeEnv,
    free_unbacked_symbols,
    guards_of,
    int_oo,
    refuse_new_guards,
    settled_by,
    take_guards,
)

__all__ = [
    "FAKE_LOGGER",
    "PRESERVED",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "LazyGraphModule",
    "OpOverload",
    "PyTreeCodeGen",
    "PyTreeInfo",
    "ShapeEnv",
    "TorchDispatchMode",
    "annotated_nodes",
    "annotating",
    "compile_graphs",
    "compiled_when_called",
    "composites_read_once",
    "decomposition_table",
    "enable_python_dispatcher",
    "free_unbacked_symbols",
    "guards_of",
    "int_oo",
    "is_backward",
    "is_composite",
    "is_of_fake_cache",
    "is_transform",
    "pytree",
    "refuse_new_guards",
    "settled_by",
    "silent_export",
    "silent_fake_tensors",
    "take_guards",
    "traced_by",
    "without_fake_cache",
    "without_stack_traces",
]
