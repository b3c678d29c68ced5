"""Whether two constants are the same to a program that was captured with one of them."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any

from ...base._tolerable import tolerable


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


__all__ = ["alike"]
