"""What the library uses of torch and transformers beyond their documented interfaces: every such name stands
in this package and nowhere else.

``tests/test_compat.py`` holds those to what is expected of them that a release could change without a word.
What imports transformers (``_transformers``) is imported where it is needed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.export._trace
import torch.fx.config
from torch import nn
from torch._C import DispatchKey
from torch._decomp import decomposition_table
from torch._decomp.decompositions import matmul as decomposed_matmul
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import TracingContext, tracing
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_impls import get_fast_op_impls
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    is_fake,
)
from torch.export import ExportedProgram
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen
from torch.fx.graph import _PyTreeInfo as PyTreeInfo
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY as PRESERVED
from torch.fx.graph_module import _assign_attr as assign_attr
from torch.fx.graph_module import _forward_from_src as forward_from_src
from torch.fx.traceback import annotate as annotating
from torch.fx.traceback import preserve_node_meta as annotated_nodes
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.numbers import int_oo

from fasp_fx.errors import VerificationError

#: the function that a graph of dynamo's calls where gradients are switched on or off
SET_GRAD = torch._C._set_grad_enabled


#: the logger of what fake tensors go on to raise
FAKE_LOGGER = "torch._subclasses.fake_tensor"


def silent_fake_tensors() -> contextlib.AbstractContextManager[object]:
    """Keep fake tensors from logging as an error what they go on to raise."""
    return mock.patch.object(logging.getLogger(FAKE_LOGGER), "disabled", True)


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


#: says of sizes what has to be true, or raises a RuntimeError; what data decide, a program asserts
settle = torch._check
#: calls of operators inside are not intercepted by ``__torch_function__``, that of a mode included
without_overrides = torch._C.DisableTorchFunction
_TRACED = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd, DispatchKey.Meta)


def is_composite(operator: OpOverload) -> bool:
    """Whether an operator is made of others, so that its schema need not say that it returns a view."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd"))


def is_transform(target: Any) -> bool:
    """Whether a call of a graph is a step of a transformation of ``torch.func`` (``vmap``, ``grad``), which
    changes what the calls after it mean.
    """
    return str(getattr(target, "__module__", "")).startswith("torch._functorch")


@contextlib.contextmanager
def traced_by(
    kernels: Mapping[OpOverload, Callable[..., Any]], fakes: Mapping[OpOverload, Callable[..., Any]]
) -> Iterator[None]:
    """Let exporters find what operators return by functions of ours, and without torch's cache of what fake
    tensors became: where sizes vary it costs more than it saves, and compares sizes that cannot be compared
    (some products of three symbols, as in the table of a block mask over dynamic lengths).

    Args:
        kernels: of operators that an exporter records whole, or takes apart.
        fakes: of those below, given fake tensors of sizes that vary.
    """

    def run(kernel: Callable[..., Any], mode: FakeTensorMode, *args: Any, **kwargs: Any) -> Any:
        with mode:
            return kernel(*args, **kwargs)

    def made_by(operator: OpOverload, key: DispatchKey, kernel: Callable[..., Any]) -> Callable[..., Any]:
        composite = DispatchKey.CompositeImplicitAutograd
        known, written = operator.py_kernels, functools.partial(operator._op_dk, composite)
        own = known.get(key) or known.get(composite) or written

        def call(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else next(iter(kwargs.values()))
            # Tensors with values are computed with, and what is written down would be the kernel's steps.
            shapes_alone = (is_fake(first) or first.device.type == "meta") and get_proxy_mode() is None
            return (kernel if shapes_alone else own)(*args, **kwargs)

        return call

    made = {operator: functools.partial(run, kernel) for operator, kernel in fakes.items()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(fake_tensor_cache_enabled=False))
        stack.enter_context(mock.patch.dict(get_fast_op_impls(), made))
        for operator, kernel in kernels.items():
            stack.callback(operator._dispatch_cache.clear)
            given = {key: made_by(operator, key, kernel) for key in _TRACED}
            stack.enter_context(mock.patch.dict(operator.py_kernels, given))
            operator._dispatch_cache.clear()
        yield


@contextlib.contextmanager
def refuse_new_guards(environment: ShapeEnv) -> Iterator[None]:
    """Raise where anything new would be assumed of the sizes.

    Frozen, an environment drops such an assumption, says so in its log alone, and remembers the answer that
    depends on it; an error it does not remember.

    Raises:
        VerificationError: names the assumption.
    """

    def refuse(expression: object, value: object) -> None:
        raise VerificationError(f"the sizes would have to fulfil {expression} == {value}")

    freeze = mock.patch.object(environment, "frozen", True)
    with freeze, mock.patch.object(environment, "_check_frozen", refuse):
        yield


def take_guards(program: ExportedProgram, other: ExportedProgram) -> None:
    """Give a program the guards on its sizes that another has; by itself it has those that its symbols came
    with when it was made.
    """
    program._guards_code = other._guards_code


def guards_of(program: ExportedProgram) -> tuple[str, ...]:
    """What a program assumes of the sizes of its inputs, in Python."""
    return tuple(program._guards_code)


def settled_by(size: torch.SymInt) -> traceback.FrameSummary | None:
    """The line of Python, in a model or in torch, that settled what a size is, if one did."""
    place = size.node.shape_env.replacements_slocs.get(size.node._expr)
    found = None if place is None else place.framework_loc
    return found if isinstance(found, traceback.FrameSummary) else None


__all__ = [
    "FAKE_LOGGER",
    "PRESERVED",
    "SET_GRAD",
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
    "TorchDispatchMode",
    "TracingContext",
    "annotated_nodes",
    "annotating",
    "aot_export_module",
    "assign_attr",
    "compile_graphs",
    "compiled_when_called",
    "decomposed_matmul",
    "decomposition_table",
    "enable_python_dispatcher",
    "forward_from_src",
    "free_unbacked_symbols",
    "guards_of",
    "int_oo",
    "is_composite",
    "is_transform",
    "lookup_backend",
    "pytree",
    "refuse_new_guards",
    "settled_by",
    "silent_export",
    "silent_fake_tensors",
    "take_guards",
    "traced_by",
    "tracing",
    "without_overrides",
    "without_stack_traces",
]
