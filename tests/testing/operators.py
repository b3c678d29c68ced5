"""Which operators the library has rules for: the ones written out, and the pointwise ones that
are derived.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from fasp_fx import patterns

#: modules that define operators of their own when they are imported
_DEFINING = {"transformers": "transformers.integrations.moe"}


def operator(name: str) -> OpOverload | None:
    """The overload of this name, or ``None`` if this version of torch lacks it."""
    space, packet, overload = name.split(".")
    if space in _DEFINING:
        importlib.import_module(_DEFINING[space])
    found: Any = getattr(getattr(torch.ops, space), packet, None)
    return getattr(found, overload, None)


@cache
def written() -> tuple[str, ...]:
    """Operators with a rule that is written out, and that this version of torch has; those that take graphs
    have tests of their own.
    """
    return tuple(
        name
        for name in patterns.builtin()
        if not name.startswith("higher_order.") and operator(name) is not None
    )


@cache
def derived() -> tuple[str, ...]:
    """Functional operators of aten whose rule is derived, and that return a tensor."""
    found = []
    for packet in map(str, dir(torch.ops.aten)):
        overloads = getattr(getattr(torch.ops.aten, packet), "overloads", None)
        for overload in overloads() if overloads is not None else ():
            name = f"aten.{packet}.{overload}"
            one = operator(name)
            if (
                one is None
                or one._schema.is_mutable
                or name in patterns.builtin()
                or patterns.lookup(one) is None
            ):
                continue
            if any("Tensor" in str(result.type) for result in one._schema.returns):
                found.append(name)
    return tuple(found)
