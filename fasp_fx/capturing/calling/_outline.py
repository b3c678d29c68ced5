"""The structure of a nested argument, to hold later calls against: lists and dicts of tensors and
constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch

from ...errors import CallError
from ._constants import alike

_PLAIN = (type(None), bool, int, float, str)


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
    return value if isinstance(value, _PLAIN) else HELD


def check_outline(name: str, value: Any, outline: Any) -> None:
    """Refuse an argument that is built otherwise than the one seen at capture, or holds another constant.

    Raises:
        CallError: names the place inside the argument, what is there and what was captured.
    """
    if outline is HELD:
        if isinstance(value, (Mapping, list, tuple, *_PLAIN)):
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
    elif isinstance(value, _PLAIN):
        shown = f"{value!r:.80}"
    return CallError(
        f"'{name}' is {shown}, but the program was captured with {expected}; capture it with what you need"
    )
