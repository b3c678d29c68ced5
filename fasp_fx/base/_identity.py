"""What tells values of the user's from others: types, contents, and the fields of objects; and where asked
for, what functions and methods do.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ._fingerprint import digest_of

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)

#: code of these packages is told by its name
_TOLD_BY_NAME = ("abc", "builtins", "collections", "fasp_fx", "numpy", "torch")


def identity_of(value: Any, name: str, asker: str, code: bool = False, within: tuple[int, ...] = ()) -> str:
    """A text that is the same for values of the same types that hold the same.

    Args:
        name: what the value is called in errors.
        asker: the option that asks.
        code: tell functions, and the methods of classes, by their code and what that is bound to: defaults,
            closures, and the plain values and functions of its module that it names.
        within: the numbers of the objects that hold it.

    Raises:
        ArgumentError: it holds a function, where these are not told, or something else of which no text says
            what it does.
    """
    if isinstance(value, _PLAIN):
        return repr(value)
    inner = (*within, id(value))
    if isinstance(value, type | FunctionType):
        named = f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, FunctionType) and not code:
            raise _unknown(name, value, asker)
        if not code or id(value) in within or value.__module__.partition(".")[0] in _TOLD_BY_NAME:
            return named
        does = _does(value) if isinstance(value, FunctionType) else _has(value)
        return f"{named}{identity_of(does, name, asker, code, inner)}"
    if isinstance(value, Tensor):
        return f"Tensor({digest_of([[value]])})"
    if id(value) in within:
        raise _unknown(name, value, asker)
    of = partial(identity_of, asker=asker, code=code, within=inner)
    if code and isinstance(value, CodeType):
        return f"{value.co_code.hex()} {value.co_names} {of(value.co_consts, name)}"
    if code and isinstance(value, MethodType):
        return of([value.__func__, value.__self__], name)
    if code and isinstance(value, partial):
        return f"partial{of([value.func, value.args, value.keywords], name)}"
    if code and isinstance(value, BuiltinFunctionType) and isinstance(value.__module__, str):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Mapping):
        return f"{{{_listed(value, name, of)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(of(item, name) for item in value)}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(of(item, name) for item in value))}}}"
    return f"{of(type(value), name)}({_listed(_fields(value, name, asker), name, of)})"


def _listed(held: Mapping[Any, Any], name: str, of: Callable[[Any, str], str]) -> str:
    return ", ".join(f"{of(key, name)}: {of(held[key], f'{name}.{key}')}" for key in held)


def _does(function: FunctionType) -> list[Any]:
    """The code of a function, and what it is bound to."""
    named = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    bound = {
        name: value
        for name, value in named.items()
        if isinstance(value, (*_PLAIN, FunctionType))
        and getattr(value, "__module__", function.__module__) == function.__module__
    }
    cells = list(inspect.getclosurevars(function).nonlocals.values())
    return [function.__code__, function.__defaults__, function.__kwdefaults__, cells, bound]


def _has(kind: type) -> list[Any]:
    """The bases of a class, its methods and its plain attributes."""
    own = {
        name: value
        for name, value in vars(kind).items()
        if isinstance(value, FunctionType)
        or (isinstance(value, _PLAIN) and not (name.startswith("__") and name.endswith("__")))
    }
    return [*kind.__bases__, own]


def _fields(value: Any, name: str, asker: str) -> dict[str, Any]:
    """The fields of an instance of a class that is written in Python."""
    slots = [slot for kind in type(value).__mro__ for slot in _slots(kind)]
    if type(value).__module__ in ("builtins", "functools") or not (slots or hasattr(value, "__dict__")):
        raise _unknown(name, value, asker)
    found = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
    return found | dict(sorted(getattr(value, "__dict__", {}).items()))


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _unknown(name: str, value: Any, asker: str) -> ArgumentError:
    return ArgumentError(
        f"{name} is {value!r}, of which {asker} cannot tell whether it is the same later; hold numbers, texts"
        f" or tensors instead, or leave out {asker}"
    )
