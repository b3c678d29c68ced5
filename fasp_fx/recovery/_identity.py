"""What tells values of the user's from others: types, contents, and the fields of objects."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._observe._calibration import digest_of
from ..errors import ArgumentError

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)


def identity_of(value: Any, name: str, within: tuple[int, ...] = ()) -> str:
    """A text that is the same for values of the same types that hold the same.

    Args:
        name: what the value is called in errors.
        within: the numbers of the objects that hold it.

    Raises:
        ArgumentError: it holds a function, or something else of which no text says what it does.
    """
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Tensor):
        return f"Tensor({digest_of([[value]])})"
    if id(value) in within:
        raise _unknown(name, value)
    inner = (*within, id(value))
    if isinstance(value, Mapping):
        return f"{{{_listed(value, name, inner)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(identity_of(item, name, inner) for item in value)}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(identity_of(item, name, inner) for item in value))}}}"
    return f"{identity_of(type(value), name)}({_listed(_fields(value, name), name, inner)})"


def _listed(held: Mapping[Any, Any], name: str, within: tuple[int, ...]) -> str:
    return ", ".join(
        f"{identity_of(key, name, within)}: {identity_of(held[key], f'{name}.{key}', within)}" for key in held
    )


def _fields(value: Any, name: str) -> dict[str, Any]:
    """The fields of an instance of a class that is written in Python."""
    slots = [slot for kind in type(value).__mro__ for slot in _slots(kind)]
    if type(value).__module__ in ("builtins", "functools") or not (slots or hasattr(value, "__dict__")):
        raise _unknown(name, value)
    found = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
    return found | dict(sorted(getattr(value, "__dict__", {}).items()))


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _unknown(name: str, value: Any) -> ArgumentError:
    return ArgumentError(
        f"{name} is {value!r}, of which checkpoint= cannot tell whether it is the same when the run goes on;"
        " hold numbers, texts or tensors instead, or leave out checkpoint="
    )


__all__ = ["identity_of"]
