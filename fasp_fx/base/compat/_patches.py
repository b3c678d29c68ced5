"""Objects of others that are changed for a while: each in a function that puts it back, nowhere else."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.export._trace
import torch.fx.config
from torch import nn
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch._subclasses.fake_impls import get_fast_op_impls
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.autograd import Function
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fasp_fx.errors import VerificationError

#: by the function that changes them, the objects of others that are changed
PATCHES: dict[str, str] = {
    "applied_functions": "torch.autograd.Function.apply",
    "attributes_read": "torch.nn.Module.__getattribute__",
    "called_as": "the method forward of a model",
    "reading_gguf": "gguf.GGUFReader, gguf.get_tensor_name_map",
    "refuse_new_guards": "ShapeEnv._check_frozen of a program",
    "silent_export": "print, as torch.export._trace has it",
    "traced_by": "OpOverload.py_kernels of some operators, torch's table of fast kernels on fake tensors",
    "without_stack_traces": "torch.fx.config.do_not_emit_stack_traces",
}


def silent_export() -> contextlib.AbstractContextManager[object]:
    """Keep ``torch.export`` from printing, once for each attempt, the graph it had when it failed."""
    return mock.patch.object(torch.export._trace, "print", create=True)


def called_as(model: nn.Module, forward: Callable[..., Any]) -> contextlib.AbstractContextManager[object]:
    """Have a model compute what a function does: exporters take modules, whose weights they name by the
    paths that a wrapper would change.
    """
    return mock.patch.object(model, "forward", forward)


def attributes_read(note: Callable[[nn.Module, str], None]) -> contextlib.AbstractContextManager[object]:
    """Tell a function of each attribute of a module that is read, by whatever code."""

    def read(module: nn.Module, name: str) -> Any:
        note(module, name)
        return object.__getattribute__(module, name)

    return mock.patch.object(nn.Module, "__getattribute__", read)


@contextlib.contextmanager
def applied_functions() -> Iterator[dict[str, None]]:
    """The names of the functions with a derivative of their own that are applied meanwhile, but for torch's:
    exporters replace them by what they compute.
    """
    applies, names = Function.__dict__["apply"], dict[str, None]()

    def apply(kind: type[Function], *args: Any, **kwargs: Any) -> Any:
        if kind.__module__.partition(".")[0] != "torch":
            names[kind.__qualname__] = None
        return applies.__get__(None, kind)(*args, **kwargs)

    with mock.patch.object(Function, "apply", classmethod(apply)):
        yield names


def reading_gguf() -> contextlib.AbstractContextManager[object]:
    """Have transformers read a GGUF file once, which takes seconds, and list the names of its tensors once,
    not for each module.
    """
    import gguf

    return mock.patch.multiple(
        gguf,
        GGUFReader=functools.cache(gguf.GGUFReader),
        get_tensor_name_map=functools.cache(gguf.get_tensor_name_map),
    )


def refuse_new_guards(environment: ShapeEnv | None) -> contextlib.AbstractContextManager[object]:
    """Raise where anything new would be assumed of the sizes, if there are any that vary.

    Frozen, an environment drops such an assumption, says so in its log alone, and remembers the answer that
    depends on it; an error it does not remember.

    Raises:
        VerificationError: names the assumption.
    """

    def refuse(expression: object, value: object) -> None:
        raise VerificationError(f"the sizes would have to fulfil {expression} == {value}")

    return (
        contextlib.nullcontext()
        if environment is None
        else mock.patch.multiple(environment, frozen=True, _check_frozen=refuse)
    )


def without_stack_traces() -> contextlib.AbstractContextManager[object]:
    """Let what is traced not look for the line of the model that made each node, which takes an eighth of a
    capture. Torch before 2.12 does not heed it.
    """
    return mock.patch.object(torch.fx.config, "do_not_emit_stack_traces", True, create=True)


_TRACED = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd, DispatchKey.Meta)


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
        tabled, compiled = operator.py_kernels, functools.partial(operator._op_dk, composite)
        usual = tabled.get(key) or tabled.get(composite) or compiled

        def call(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else next(iter(kwargs.values()))
            # Tensors with values are computed with, and what is written down would be the kernel's steps.
            shapes_alone = (is_fake(first) or first.device.type == "meta") and get_proxy_mode() is None
            return (kernel if shapes_alone else usual)(*args, **kwargs)

        return call

    by_mode = {operator: functools.partial(run, kernel) for operator, kernel in fakes.items()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(fake_tensor_cache_enabled=False))
        stack.enter_context(mock.patch.dict(get_fast_op_impls(), by_mode))
        for operator, kernel in kernels.items():
            stack.callback(operator._dispatch_cache.clear)
            by_key = {key: made_by(operator, key, kernel) for key in _TRACED}
            stack.enter_context(mock.patch.dict(operator.py_kernels, by_key))
            operator._dispatch_cache.clear()
        yield
