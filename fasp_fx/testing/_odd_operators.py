"""Operators that no rule describes, one for each form that a return can have. All mix the last dimension, so
that a channel less shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fasp_fx_odd", "DEF")


def _define(schema: str, real: Callable[..., object], fake: Callable[..., object]) -> None:
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, real, "CPU")
    _LIBRARY.impl(name, real, "CUDA")
    torch.library.register_fake(f"fasp_fx_odd::{name}", fake, lib=_LIBRARY)


def _mixed(x: Tensor) -> Tensor:
    return x + 0.5 * x.flip(-1)


def _fill(into: Tensor, x: Tensor) -> None:
    into.copy_(x.cumsum(-1))


_define(
    "number(Tensor x) -> SymInt",
    lambda x: int((x > 0).sum()),
    lambda x: torch.library.get_ctx().new_dynamic_size(),
)
_define(
    "pair(Tensor x) -> (int, Tensor)",
    lambda x: (x.shape[-1], _mixed(x)),
    lambda x: (x.shape[-1], torch.empty_like(x)),
)
_define(
    "several(Tensor x) -> (Tensor[], Tensor)",
    lambda x: ([2 * x, x.flip(-1)], _mixed(x)),
    lambda x: ([torch.empty_like(x), torch.empty_like(x)], torch.empty_like(x)),
)
_define("fill(Tensor(a!) into, Tensor x) -> ()", _fill, lambda into, x: None)


def foreign(kind: str, x: Tensor) -> Tensor:
    """What becomes of a tensor whose channels are last, or along its second dimension."""
    operators = torch.ops.fasp_fx_odd
    if kind == "number":
        return x * (1 + operators.number(x))
    if kind == "pair":
        count, found = operators.pair(x)
        return found / count
    if kind == "several":
        first, second = operators.several(x)
        return first[1] + second
    made = torch.zeros_like(x)
    operators.fill(made, x)
    return made
