"""What tells values of the user's from others: types, contents, and the fields of objects; of code, the key
that its user gives it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ._fingerprint import digest_of

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)


def identity_of(value: Any, name: str, asker: str, within: tuple[int, ...] = ()) -> str:
    """A text that is the same for values of the same types that hold the same. Classes are told by their
    names, functions by an attribute ``key``.

    Args:
        name: what the value is called in errors.
        asker: the option that asks.
        within: the numbers of the objects that hold it.

    Raises:
        ArgumentError: it holds a function without a key, or something else of which no text says what it
            does.
    """
    if isinstance(value, _PLAIN):
        return repr(value)
    kind = value if isinstance(value, type) else type(value)
    named = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, type):
        return named
    if isinstance(value, Tensor):
        return f"Tensor({digest_of([[value]])})"
    if id(value) in within:
        raise _unknown(name, value, asker)
    of = partial(identity_of, asker=asker, within=(*within, id(value)))
    if isinstance(value, Mapping):
        return f"{{{_listed(value, name, of)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(of(item, name) for item in value)}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(of(item, name) for item in value))}}}"
    return f"{named}({_listed(_fields(value, name, asker), name, of)})"


def _listed(held: Mapping[Any, Any], name: str, of: Callable[[Any, str], str]) -> str:
    return ", ".join(f"{of(key, name)}: {of(held[key], f'{name}.{key}')}" for key in held)


def _fields(value: Any, name: str, asker: str) -> dict[str, Any]:
    """The fields of an instance of a class that is written in Python; the key of what is none."""
    slots = [slot for kind in type(value).__mro__ for slot in _slots(kind)]
    if type(value).__module__ in ("builtins", "functools") or not (slots or hasattr(value, "__dict__")):
        if isinstance(key := getattr(value, "key", None), str):
            return {"key": key}
        raise _unknown(name, value, asker)
    found = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
    return found | dict(sorted(getattr(value, "__dict__", {}).items()))


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _unknown(name: str, value: Any, asker: str) -> ArgumentError:
    return ArgumentError(
        f"{name} is {value!r}, of which {asker} cannot tell whether it is the same later; give it an"
        f" attribute 'key', a text that is another whenever it does something else, or leave out {asker}"
    )
