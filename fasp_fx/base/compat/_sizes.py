"""What torch knows of the symbols in sizes: the fields of an environment of shapes are documented nowhere."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.numbers import int_oo

#: what torch takes for no bound
_UNBOUNDED = (int_oo, -int_oo, sympy.oo, -sympy.oo)


def hint_of(symbol: sympy.Symbol, environment: ShapeEnv) -> int | None:
    """The size that a symbol stands for in the example; ``None`` where only a run tells."""
    hint = environment.backed_var_to_val.get(symbol)
    return None if hint is None else int(hint)


def bounds_of(symbol: sympy.Expr, environment: ShapeEnv) -> tuple[int | None, int | None]:
    """The smallest and the largest size that a capture takes a symbol to have, where there are such."""
    known = environment.var_to_range.get(symbol)
    return (None, None) if known is None else (finite(known.lower), finite(known.upper))


def finite(bound: Any) -> int | None:
    """A bound of a range as an integer; ``None`` where there is none."""
    return None if bound in _UNBOUNDED else int(bound)


def conditions_on(environment: ShapeEnv) -> list[sympy.Expr]:
    """What a capture took for true of its sizes."""
    return [guard.expr for guard in environment.guards]


def asserted(environment: ShapeEnv) -> Iterator[sympy.Expr]:
    """What a program asserts of sizes that only a run tells."""
    for assertions in environment.deferred_runtime_asserts.values():
        yield from (assertion.expr for assertion in assertions)


def count_assumptions(environment: ShapeEnv) -> int:
    """How many conditions and settled symbols there are: more, once anything new was assumed."""
    return len(environment.guards) + len(environment.replacements)


def settled_by(size: torch.SymInt) -> traceback.FrameSummary | None:
    """The line of Python, in a model or in torch, that settled what a size is, if one did."""
    place: Any = size.node.shape_env.replacements_slocs.get(size.node._expr)
    line = None if place is None else place.framework_loc
    return line if isinstance(line, traceback.FrameSummary) else None
