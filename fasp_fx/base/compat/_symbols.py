"""Symbolic sizes: what torch knows of them, in fields of an environment of shapes that nothing documents, and
those of a program that is put together of what was saved of it.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import (
    ShapeEnv,
    _free_unbacked_symbols_with_path,
    free_unbacked_symbols,
)
from torch.utils._sympy import functions
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges
from torch.utils._traceback import CapturedTraceback

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


def conditions_on(environment: ShapeEnv) -> list[sympy.Eq]:
    """The equations that a capture took for true of its sizes."""
    return [guard.expr for guard in environment.guards if isinstance(guard.expr, sympy.Eq)]


def asserted(environment: ShapeEnv) -> list[sympy.Eq]:
    """The equations that a program asserts of sizes that only a run tells."""
    asserts = itertools.chain.from_iterable(environment.deferred_runtime_asserts.values())
    return [assertion.expr for assertion in asserts if isinstance(assertion.expr, sympy.Eq)]


def count_assumptions(environment: ShapeEnv) -> int:
    """How many conditions and settled symbols there are: more, once anything new was assumed."""
    return len(environment.guards) + len(environment.replacements)


def settled_by(size: torch.SymInt) -> traceback.FrameSummary | None:
    """The line of Python, in a model or in torch, that settled what a size is, if one did."""
    place: Any = size.node.shape_env.replacements_slocs.get(size.node._expr)
    line = None if place is None else place.framework_loc
    return line if isinstance(line, traceback.FrameSummary) else None


# --- Sizes of what was saved.


_SYMPY = (
    *(sympy.Rational, sympy.Add, sympy.Mul, sympy.Pow, sympy.Max, sympy.Min, sympy.floor, sympy.ceiling),
    *(sympy.Abs, sympy.Piecewise, sympy.functions.elementary.piecewise.ExprCondPair, sympy.Tuple, sympy.Eq),
    *(sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.And, sympy.Or, sympy.Not),
)
#: what an expression of sizes is made of, by name; sizes are never raised or shifted by much
SIZE_FUNCTIONS: dict[str, Any] = {
    **{kind.__name__: kind for kind in _SYMPY},
    **{name: getattr(functions, name) for name in ("Max", "Min", *functions.__all__)},
}
_CONSTRAINS = torch.ops.aten.sym_constrain_range_for_size.default


class Symbols:
    """Symbols as they are added, and what is made under them.

    Attributes:
        mode: the mode of stand-ins whose sizes they are.
        ranges: the sizes that each can have, for an exported program.
    """

    def __init__(self) -> None:
        self._environment = ShapeEnv(assume_static_by_default=True)
        self.mode = FakeTensorMode(
            allow_fallback_kernels=False, allow_non_fake_inputs=True, shape_env=self._environment
        )
        self.ranges: dict[sympy.Symbol, ValueRanges[Any]] = {}
        self._hints: dict[sympy.Symbol, sympy.Integer] = {}
        self._pending: set[sympy.Symbol] = set()

    def add(self, symbol: sympy.Symbol, bounds: tuple[int | None, int | None], hint: int | None) -> None:
        """Take a symbol in.

        Args:
            bounds: the smallest and the largest size; ``None``: there is none.
            hint: the size in the example; ``None``: only a run tells.
        """
        environment, (lower, upper) = self._environment, bounds
        known = ValueRanges(-int_oo if lower is None else lower, int_oo if upper is None else upper)
        environment.var_to_stack[symbol] = CapturedTraceback.extract(skip=1)
        if hint is not None:
            self._hints[symbol] = sympy.Integer(hint)
            environment.add_backed_var_to_val(symbol, hint)
        elif free_unbacked_symbols(symbol):
            self._pending.add(symbol)
            following = int(symbol.name.strip("fuz")) + 1  # so that others are called otherwise
            environment.unbacked_symint_counter = max(environment.unbacked_symint_counter, following)
            environment.unbacked_symfloat_counter = max(environment.unbacked_symfloat_counter, following)
        if bounds != (None, None):
            self.ranges[symbol] = known
            environment.constrain_symbol_range(symbol, compiler_min=known.lower, compiler_max=known.upper)

    def size(self, expression: sympy.Expr) -> int | torch.SymInt:
        """A size."""
        hint = expression.xreplace(self._hints)
        return self._environment.create_symintnode(expression, hint=int(hint) if hint.is_Integer else None)

    def example(self, sizes: Iterable[int | torch.SymInt]) -> list[int]:
        """Sizes in the example."""
        expressions = (size if isinstance(size, int) else size.node.expr for size in sizes)
        return [int(sympy.sympify(expression).xreplace(self._hints)) for expression in expressions]

    def real(self, expression: sympy.Expr) -> float | torch.SymFloat:
        """A real number that is made of sizes."""
        hint = expression.xreplace(self._hints)
        return self._environment.create_symfloatnode(expression, hint=float(hint) if hint.is_number else None)

    def truth(self, expression: sympy.Expr) -> bool | torch.SymBool:
        """Whether a condition on sizes holds."""
        return self._environment.create_symboolnode(expression)

    def note(self, node: fx.Node) -> None:
        """Take in what a node says of sizes: an assertion, a range, or that it makes some that only a run
        tells; all in the order of the graph.
        """
        said = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
        if node.target is torch.ops.aten._assert_scalar.default and isinstance(said, torch.SymBool):
            self._environment.guard_or_defer_runtime_assert(said.node.expr, "", node)
        elif node.target is _CONSTRAINS and isinstance(said, torch.SymInt):
            self._environment._constrain_range_for_size(said.node.expr)
        bindings = _free_unbacked_symbols_with_path(
            node.meta.get("val"), (), shape_env=self._environment, pending=self._pending, simplify=True
        )
        if bindings:
            node.meta["unbacked_bindings"] = bindings


def ranges_of(program: ExportedProgram) -> dict[sympy.Symbol, tuple[int | None, int | None]]:
    """The smallest and the largest size that a program takes each symbol to have; ``None``: none."""
    return {
        symbol: (finite(bounds.lower), finite(bounds.upper))
        for symbol, bounds in program.range_constraints.items()
    }
