"""Whether two constants are the same to a program that was captured with one of them."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch

from ..base._tolerable import tolerable
from ..errors import CallError


def alike(value: Any, expected: Any) -> bool:
    """Whether two constants are of the same types and equal, also inside, and in the same order; objects
    whose class does not say what makes them equal are by what they hold.
    """
    return _alike(value, expected, set())


def _alike(value: Any, expected: Any, seen: set[tuple[int, int]]) -> bool:
    """The same.

    Args:
        seen: the identities of pairs that are being compared.
    """
    if value is expected or (id(value), id(expected)) in seen:
        return True
    if type(value) is not type(expected):
        return False
    seen = seen | {(id(value), id(expected))}
    if isinstance(value, Mapping):
        return list(value) == list(expected) and all(
            _alike(item, expected[key], seen) for key, item in value.items()
        )
    if isinstance(value, (list, tuple)):
        return len(value) == len(expected) and all(
            _alike(item, other, seen) for item, other in zip(value, expected, strict=True)
        )
    if _is_made_of_fields(value):
        own, other = (dict(sorted(vars(one).items())) for one in (value, expected))
        return _alike(own, other, seen)
    return _equal(value, expected)


def _is_made_of_fields(value: Any) -> bool:
    """Whether what an object holds by name is all that two of its class can differ by."""
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    kind = type(value)
    return kind.__eq__ is object.__eq__ or dataclasses.is_dataclass(kind) or kind is types.SimpleNamespace


def _equal(value: Any, expected: Any) -> bool:
    """Whether two constants of one type are equal; what is not a number is like another such, and zeros have
    a sign.
    """
    if isinstance(value, float) and value == expected == 0:
        return math.copysign(1.0, value) == math.copysign(1.0, expected)
    try:
        found = value == expected
        if hasattr(found, "all"):  # arrays, which are compared entry by entry
            return value.shape == expected.shape and bool(found.all())
        return bool(found) or (value != value and expected != expected)
    except tolerable(AttributeError, ValueError, TypeError, RuntimeError):
        return False


# --- The structure of a nested argument, to hold later calls against: lists and dicts of tensors and
# constants.


#: constants that exporters take as arguments
PLAIN = (type(None), bool, int, float, str)


class Held(Enum):  # the one object of its kind also where it was copied
    """Stands for a tensor, or for an object that knows its own tensors (a cache, say)."""

    HELD = "a tensor"


HELD = Held.HELD


def outline_of(value: Any) -> Any:
    """The argument with :data:`HELD` in the place of what the graph takes; constants stay."""
    if isinstance(value, Mapping):
        return {key: outline_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [outline_of(item) for item in value]
    return value if isinstance(value, PLAIN) else HELD


def check_outline(name: str, value: Any, outline: Any) -> None:
    """Refuse an argument that is built otherwise than the one seen at capture, or holds another constant.

    Raises:
        CallError: names the place inside the argument, what is there and what was captured.
    """
    if outline is HELD:
        if isinstance(value, (Mapping, list, tuple, *PLAIN)):
            raise _refusal(name, value, "a tensor")
    elif isinstance(outline, dict):
        if not isinstance(value, Mapping):
            raise _refusal(name, value, f"a dict with the keys {list(outline)}")
        if value.keys() != outline.keys():
            raise CallError(
                f"'{name}' has the keys {list(value)}, but the program was captured with {list(outline)};"
                " capture it with the keys you need"
            )
        for key, inside in outline.items():
            check_outline(f"{name}[{key!r}]", value[key], inside)
    elif isinstance(outline, list):
        if not isinstance(value, (list, tuple)):
            raise _refusal(name, value, f"a list of {len(outline)}")
        if len(value) != len(outline):
            raise CallError(
                f"'{name}' holds {len(value)} items, but the program was captured with {len(outline)};"
                " capture it with the number you need"
            )
        for index, (item, inside) in enumerate(zip(value, outline, strict=True)):
            check_outline(f"{name}[{index}]", item, inside)
    elif not alike(value, outline):
        raise _refusal(name, value, repr(outline))


def _refusal(name: str, value: Any, expected: str) -> CallError:
    shown = f"a {type(value).__name__}"
    if isinstance(value, torch.Tensor):
        shown = f"a tensor of shape {tuple(value.shape)}"
    elif isinstance(value, PLAIN):
        shown = f"{value!r:.80}"
    return CallError(
        f"'{name}' is {shown}, but the program was captured with {expected}; capture it with what you need"
    )
