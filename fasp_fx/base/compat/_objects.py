"""What objects of torch keep to themselves, a function for each thing that is read or written: where a
release renames one, one line here changes. What can be done without is left out where the name is gone.
"""

from __future__ import annotations

import copy
import itertools
import traceback
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
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

#: lists of their own parameters that recurrent modules make anew as they run; they keep no others
RECURRENT_LISTS = frozenset({"_flat_weights", "_flat_weight_refs"})


def schema_of(operator: OpOverload) -> Any:
    """The schema of an operator: its arguments, with types and defaults, what it writes into, and what it
    returns.
    """
    return operator._schema


def codegen_of(graph: fx.Graph) -> Any:
    """What writes the code of a graph and knows how its inputs and outputs are nested;
    ``Graph.set_codegen`` sets it.
    """
    return graph._codegen


def rename(node: fx.Node, name: str) -> None:
    """Give a node of a graph another name, with a number behind it where a node has that already."""
    node._rename(name)


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written into; ``None`` where torch does not count."""
    return None if tensor.is_inference() else getattr(tensor, "_version", None)


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor shows a part of another one to autograd."""
    return tensor._base is not None


def storage_id(tensor: Tensor) -> object:
    """What tensors that share memory have in common, also where there is none: a fake tensor has no
    address.
    """
    return tensor.untyped_storage()._cdata


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """The names of a module's own buffers that its state dict leaves out, to be read and changed."""
    return module._non_persistent_buffers_set


def forward_pre_hooks(module: nn.Module) -> MutableMapping[int, Any]:
    """The hooks that a module calls before its ``forward``, by number, to be read and changed."""
    return module._forward_pre_hooks


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """The hooks of a module itself, before and after its ``forward`` and on the way back."""
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        yield from getattr(module, kind, {}).values()


def trees_of(module: nn.Module) -> list[Any]:
    """The structures of the inputs and the outputs of a graph module whose code takes them apart."""
    return [getattr(module, name, None) for name in ("_in_spec", "_out_spec")]


def written_by_hook(hook: Any) -> set[str]:
    """The attributes that a hook of ``torch.nn.utils`` sets: it says so under one of two names."""
    return {getattr(hook, "name", ""), getattr(hook, "_tensor_name", "")}


def guards_of_module(module: nn.Module) -> Any:
    """The module that checks the sizes of a call of an exported program's module; ``None`` where there is
    none.
    """
    return getattr(module, "_guards_fn", None)


def set_guards(module: nn.Module, guards: nn.Module) -> None:
    """Put another module in the place of that one."""
    module._guards_fn = guards


def with_parts(program: ExportedProgram, **parts: Any) -> ExportedProgram:
    """A copy of an exported program with some of its parts (``graph_module``, ``graph_signature``,
    ``state_dict``, ``constants``) others; its constructor would trace and verify everything anew.
    """
    changed = copy.copy(program)
    for name, part in parts.items():
        setattr(changed, f"_{name}", part)
    return changed


# --- What is known of symbolic sizes: the fields of an environment of shapes are documented nowhere.


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


def conditions_on(environment: ShapeEnv) -> list[sympy.Eq | sympy.Ne]:
    """What a capture took for equal, or for unequal, of its sizes."""
    return [guard.expr for guard in environment.guards if isinstance(guard.expr, sympy.Eq | sympy.Ne)]


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


# --- The symbolic sizes of a program that is put together of what was saved of it.


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
        return [
            size if isinstance(size, int) else int(size.node.expr.xreplace(self._hints)) for size in sizes
        ]

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
