"""Capture each model once while it is being checked. A capture must survive any number of prunings unchanged,
so this only adds to what is tested.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fasp_fx import _captured
from fasp_fx._parts import _submodules
from fasp_fx._program import Program

Capture = Callable[..., Program]


@contextmanager
def one_capture() -> Iterator[None]:
    """Inside, captures of one model object with inputs of one shape are made once."""
    module: Any = _captured
    original = module.capture_program
    seen: dict[tuple[int, str], tuple[object, object]] = {}

    def capture(model: object, args: object = (), kwargs: object = None, **options: object) -> object:
        leaves = pytree.tree_leaves((args, kwargs or {}))
        shapes = [
            (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
        ]
        key = (id(model), f"{shapes} {options}")
        if key not in seen:
            seen[key] = (model, original(model, args, kwargs, **options))
        return seen[key][1]

    module.capture_program = capture
    try:
        yield
    finally:
        module.capture_program = original


class _Unknown(Exception):
    """What a model holds cannot be written down."""


class _Content(pickle.Pickler):
    """Writes down what a model is: classes by name, attributes, values of tensors and which share storage."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.storages: dict[int, int] = {}
        self.tensors: list[Tensor] = []

    def reducer_override(self, item: Any) -> Any:
        """What has no name to be found by is only equal to itself; the model that is kept keeps it."""
        if isinstance(item, (type, types.FunctionType)) and "<" in item.__qualname__:
            return int, (id(item),)
        return NotImplemented

    def persistent_id(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return None
        known = type(item) in (Tensor, nn.Parameter)
        if not known or item.device.type != "cpu" or item.layout != torch.strided:
            raise _Unknown
        self.tensors.append(item)
        storage = item.untyped_storage()
        number = self.storages.setdefault(storage.data_ptr(), len(self.storages))
        values = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
        flags = (type(item).__name__, item.requires_grad, item.is_leaf, vars(item))
        place = (str(item.dtype), tuple(item.shape), item.stride(), item.storage_offset(), number)
        return (*flags, *place, hashlib.sha256(values.numpy().tobytes()).hexdigest())


def _content(model: object, call: object) -> tuple[bytes, list[Tensor]] | None:
    """The same bytes for equal models called alike, and their tensors in one order.

    ``None`` for what is no module, or cannot be written down.
    """
    if not isinstance(model, nn.Module) or isinstance(model, fx.GraphModule):
        return None
    file = io.BytesIO()
    writer = _Content(file)
    try:
        writer.dump((model, call))
    except Exception:  # whatever the classes of its parts raise: scripted and parametrised ones refuse
        return None
    return file.getvalue(), writer.tensors


def _over(program: Program, old: list[Tensor], new: list[Tensor]) -> Program:
    """The program over the tensors of an equal model."""
    other = {id(before): now for before, now in zip(old, new, strict=True)}
    made = program.copy()
    for module in made.module.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                held[name] = other.get(id(tensor), tensor)  # type: ignore[assignment]
    made.replaced = {name: other.get(id(tensor), tensor) for name, tensor in made.replaced.items()}
    return made


#: what was captured, the last one last
_made: dict[bytes, tuple[object, list[Tensor], Program]] = {}
#: how many of them are kept
_KEPT = 100


def _once(original: Capture) -> Capture:
    def capture(model: object, args: object = (), kwargs: object = None, **options: object) -> Program:
        call = (args, kwargs or {}, sorted(options.items()))
        found = _content(model, call)
        if found is None:
            return original(model, args, kwargs, **options)
        key, tensors = found
        if key in _made:
            first, old, program = _made[key]
            if (_content(first, call) or (b"",))[0] == key:  # and no test has changed it since
                return _over(program, old, tensors)
        program = original(model, args, kwargs, **options)
        _made.pop(key, None)
        _made[key] = (model, tensors, program)
        if len(_made) > _KEPT:
            del _made[next(iter(_made))]
        return program

    return capture


@contextmanager
def equal_captures() -> Iterator[None]:
    """Inside, captures of equal models with equal inputs are made once per process.

    Each is handed out over the weights of the model that is asked for.
    """
    modules: tuple[Any, ...] = (_captured, _submodules)
    originals = [module.capture_program for module in modules]
    for module, original in zip(modules, originals, strict=True):
        module.capture_program = _once(original)
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.capture_program = original
