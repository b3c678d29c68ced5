"""Operators as graphs hold them, and what torch knows of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch._export.utils
from torch._C import DispatchKey
from torch._decomp import decomposition_table
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

#: what torch reads that list with
_READ = "_materialize_cpp_cia_ops"
_TRACED = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd, DispatchKey.Meta)


def is_composite(operator: OpOverload) -> bool:
    """Whether an operator is made of others, so that its schema need not say that it returns a view."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd"))


def is_transform(target: Any) -> bool:
    """Whether a call of a graph is a step of a transformation of ``torch.func`` (``vmap``, ``grad``), which
    changes what the calls after it mean.
    """
    return str(getattr(target, "__module__", "")).startswith("torch._functorch")


def composites_read_once() -> contextlib.AbstractContextManager[object]:
    """Let torch read the list of all composite operators once inside; without, it does for each namespace of
    operators whenever it decomposes.
    """
    module = torch._export.utils
    read = getattr(module, _READ, lambda: None)
    return mock.patch.object(module, _READ, functools.cache(read), create=True)


@contextlib.contextmanager
def traced_by(kernels: Mapping[OpOverload, Callable[..., Any]]) -> Iterator[None]:
    """Let exporters find what operators return by functions of ours."""
    with contextlib.ExitStack() as stack:
        for operator, kernel in kernels.items():
            stack.callback(operator._dispatch_cache.clear)
            stack.enter_context(mock.patch.dict(operator.py_kernels, dict.fromkeys(_TRACED, kernel)))
            operator._dispatch_cache.clear()
        yield


__all__ = [
    "HigherOrderOperator",
    "OpOverload",
    "TorchDispatchMode",
    "composites_read_once",
    "decomposition_table",
    "is_composite",
    "is_transform",
    "traced_by",
]
