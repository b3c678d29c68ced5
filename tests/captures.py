"""Capture each model once while it is being checked. A capture must survive any number of prunings unchanged,
so this only adds to what is tested.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from fasp_fx.capturing import Program, _capture, _submodules

Capture = Callable[..., Program]


class _Unknown(Exception):
    """What a model holds cannot be written down."""


class _Content(pickle.Pickler):
    """Writes down what a model and a call of it are: classes by name, attributes, tensors and which of them
    share storage, and values of tensors where a capture can depend on them.

    Parameters, and inputs of floating point, are captured without their values.
    """

    def __init__(self, file: io.BytesIO, inputs: list[Tensor]) -> None:
        super().__init__(file, protocol=5)
        self.storages: dict[int, int] = {}
        self.tensors: list[Tensor] = []
        self.inputs = {id(tensor) for tensor in inputs}

    def reducer_override(self, item: Any) -> Any:
        """What has no name to be found by is only equal to itself; the model that is kept keeps it.

        Parametrised modules, which refuse, are of a class made for each of them, and hold functions of their
        own for the state dict.
        """
        if isinstance(item, nn.Module) and parametrize.is_parametrized(item):
            own = {name: value for name, value in vars(item).items() if "state_dict" not in name}
            return tuple, ((type(item).__bases__[0], own),)
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
        flags = (type(item).__name__, item.requires_grad, item.is_leaf, vars(item))
        place = (str(item.dtype), tuple(item.shape), item.stride(), item.storage_offset(), number)
        unread = isinstance(item, nn.Parameter) or (id(item) in self.inputs and item.is_floating_point())
        return (*flags, *place, None if unread else _values([item]))


def _values(tensors: list[Tensor]) -> str:
    """What tells the values of tensors from others."""
    found = hashlib.sha256()
    for tensor in tensors:
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]
        found.update(whole.numpy().tobytes())
    return found.hexdigest()


def _content(model: object, call: tuple[Any, ...]) -> tuple[bytes, list[Tensor]] | None:
    """The same bytes for models that are captured alike, called alike, and their tensors in one order.

    ``None`` for what is no module, or cannot be written down.
    """
    if not isinstance(model, nn.Module) or isinstance(model, fx.GraphModule):
        return None
    file = io.BytesIO()
    writer = _Content(file, [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)])
    try:
        writer.dump((model, call))
    except Exception:  # whatever the classes of its parts raise: scripted ones refuse
        return None
    return file.getvalue(), writer.tensors


def _over(program: Program, old: list[Tensor], new: list[Tensor]) -> Program:
    """The program over the tensors of an equal model, and with its inputs for the example."""
    other = {id(before): now for before, now in zip(old, new, strict=True)}
    made = program.copy()
    for module in made.module.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                held[name] = other.get(id(tensor), tensor)  # type: ignore[assignment]
    made.replaced = {name: other.get(id(tensor), tensor) for name, tensor in made.replaced.items()}
    given = {_place(before): now.detach() for before, now in zip(old, new, strict=True)}
    made.example = pytree.tree_map(
        lambda leaf: given.get(_place(leaf), leaf) if isinstance(leaf, Tensor) else leaf, program.example
    )
    return made


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in memory, and how."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _holds_values(program: Program, tensors: list[Tensor]) -> bool:
    """Whether a program holds values that were computed: weights that were folded, others that are none of
    the model's, an example made larger.
    """
    given, own = set(map(_place, tensors)), set(map(id, tensors))
    example = [leaf for leaf in pytree.tree_leaves(program.example) if isinstance(leaf, Tensor)]
    return (
        bool(program.folds or program.replaced)
        or any(id(tensor) not in own for tensor in program.weights().values())
        or any(leaf.is_floating_point() and _place(leaf) not in given for leaf in example)
    )


def _surroundings() -> tuple[Any, ...]:
    """What a model is called in, which a capture can depend on."""
    return (
        torch.get_default_dtype(),
        str(torch.get_default_device()),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
    )


def _has_hooks_for_all() -> bool:
    """Whether calls of all modules are hooked into, which no model shows."""
    held = (name for name in vars(nn.modules.module) if name.startswith("_global_") and "hooks" in name)
    return any(len(hooks) for name in held if (hooks := getattr(nn.modules.module, name)) is not None)


#: what was captured, that of the last use last; with the values, where the program holds some
_made: dict[bytes, tuple[object, tuple[Any, ...], list[Tensor], Program, str | None]] = {}
#: how many of them are kept
_KEPT = 300


def _once(original: Capture) -> Capture:
    def capture(model: object, args: object = (), kwargs: object = None, **options: object) -> Program:
        call = (args, kwargs or {}, sorted(options.items()), _surroundings())
        found = None if _has_hooks_for_all() else _content(model, call)
        if found is None:
            return original(model, args, kwargs, **options)
        key, tensors = found
        if key in _made:
            first, its_call, old, program, values = _made[key]
            unchanged = (_content(first, its_call) or (b"",))[0] == key  # by a test since
            if unchanged and (values is None or values == _values(old) == _values(tensors)):
                _made[key] = _made.pop(key)
                return _over(program, old, tensors)
        program = original(model, args, kwargs, **options)
        values = _values(tensors) if _holds_values(program, tensors) else None
        _made.pop(key, None)
        # A copy: whom it is given to may change its graph, or put other weights into it.
        _made[key] = (model, call, tensors, program.copy(), values)
        if len(_made) > _KEPT:
            del _made[next(iter(_made))]
        return program

    return capture


@contextmanager
def equal_captures() -> Iterator[None]:
    """Inside, captures of equal models with inputs of one kind are made once per process, whatever their
    weights: what a capture finds it finds of tensors without values.

    Each is handed out over the weights of the model that is asked for.
    """
    with ExitStack() as stack:
        for module, name in ((_capture, "capture"), (_submodules, "capture")):
            stack.enter_context(mock.patch.object(module, name, _once(getattr(module, name))))
        yield
