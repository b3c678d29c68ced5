"""Sizes: which of the inputs vary from call to call, and integers that stand for symbols: small where the
program allows, those of the example inputs otherwise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import sympy
import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind

from fasp_fx.base import asserted, bounds_of, conditions_on, hint_of, pytree, tensors_in

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


@dataclass(frozen=True)
class Size:
    """One size as a product: an integer times sizes that vary from call to call; ``value`` is what it is in
    the interpretation.
    """

    number: int
    varying: frozenset[tuple[Any, int]] = frozenset()
    value: int = 0

    @staticmethod
    def fixed(value: int) -> Size:
        return Size(value, frozenset(), value)

    def divides(self, other: Size) -> bool:
        """Whether the other is a multiple of this one at all sizes."""
        is_part = Counter(dict(self.varying)) <= Counter(dict(other.varying))
        return is_part and self.number > 0 and other.number % self.number == 0

    def over(self, other: Size) -> Size:
        """The quotient by a size that divides this one."""
        left = Counter(dict(self.varying)) - Counter(dict(other.varying))
        return Size(self.number // other.number, frozenset(left.items()), self.value // max(other.value, 1))

    def times(self, other: Size) -> Size:
        return Size(
            self.number * other.number,
            frozenset((Counter(dict(self.varying)) + Counter(dict(other.varying))).items()),
            self.value * other.value,
        )


def is_dynamic(size: object) -> TypeGuard[torch.SymInt]:
    """Whether a recorded size varies from call to call; a symbol that the capture has settled does not."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def same_sizes(first: Sequence[int | torch.SymInt], second: Sequence[int | torch.SymInt]) -> bool:
    """Whether recorded sizes are the same whatever their symbols stand for; a comparison of the sizes
    themselves can settle a symbol that happens to be as large in the example.
    """
    return [_expression(size) for size in first] == [_expression(size) for size in second]


def _expression(size: int | torch.SymInt) -> object:
    return size.node.expr if isinstance(size, torch.SymInt) else size


class Sizes:
    """Turns symbolic shapes recorded at capture into integers, all by the same assignment of symbols."""

    def __init__(self, module: fx.GraphModule, small: bool) -> None:
        self.small = small
        self.assigned: dict[sympy.Symbol, int] = {}
        self._known: dict[sympy.Expr, int] = {}
        self._settled: set[sympy.Expr] = set()
        for node in module.graph.find_nodes(op="placeholder"):
            recorded = node.meta.get("val")
            for size in recorded.shape if isinstance(recorded, Tensor) else (recorded,):
                if isinstance(size, torch.SymInt):
                    self._assign(size)
        computed = [node.meta.get("val") for node in module.graph.nodes if node.op == "call_function"]
        sizes = [value for value in computed if isinstance(value, torch.SymInt)]
        for environment in {id(size.node.shape_env): size.node.shape_env for size in sizes}.values():
            self._share_out(environment)

    def _share_out(self, environment: Any) -> None:
        """Numbers known only at run time that the program says add up to a size, such as how many tokens each
        expert gets, share it.
        """
        for equation in asserted(environment):
            difference = sympy.expand(equation.lhs - equation.rhs)
            self._choose_total(difference, environment)
            difference = sympy.expand(difference.xreplace(self.assigned))
            parts = sorted(difference.free_symbols, key=str)
            for total in (sympy.Add(*parts) - difference, sympy.Add(*parts) + difference):
                if parts and total.is_Integer and total >= 0:
                    each, over = divmod(int(total), len(parts))
                    self.assigned |= {symbol: each + (index < over) for index, symbol in enumerate(parts)}

    def _choose_total(self, difference: sympy.Expr, environment: Any) -> None:
        """A total that is itself known only at run time is chosen before its parts: the one symbol that
        stands against all the others.
        """
        signs = {symbol: difference.coeff(symbol) for symbol in difference.free_symbols}
        for symbol, sign in signs.items():
            others = [other for name, other in signs.items() if name != symbol]
            if symbol not in self.assigned and len(others) > 1 and all(other == -sign for other in others):
                self._choose(symbol, environment)

    def _assign(self, size: torch.SymInt) -> None:
        for symbol in sorted(size.node.expr.free_symbols - self.assigned.keys(), key=str):
            self._choose(symbol, size.node.shape_env)

    def _choose(self, symbol: sympy.Symbol, environment: Any) -> None:
        hint = hint_of(symbol, environment)
        wanted = _PRIMES[len(self.assigned) % len(_PRIMES)] if hint is None or self.small else hint
        lower, upper = _range(symbol, environment)
        self.assigned[symbol] = max(wanted if upper is None else min(wanted, upper), lower)

    def integer(self, size: int | torch.SymInt) -> int:
        """One size as an integer."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if expression not in self._known:
            self._assign(size)
            self._known[expression] = int(expression.xreplace(self.assigned))
        return self._known[expression]

    def fit(self, recorded: Any, executed: Any) -> bool:
        """Whether tensors have the shapes that were recorded of them; sizes that a program cannot be called
        with give others.
        """
        if isinstance(recorded, torch.Tensor) and isinstance(executed, torch.Tensor):
            return len(recorded.shape) != len(executed.shape) or all(
                not isinstance(size, torch.SymInt) or self.integer(size) == length
                for size, length in zip(recorded.shape, executed.shape)
            )
        are_lists = isinstance(recorded, (list, tuple)) and isinstance(executed, (list, tuple))
        return all(map(self.fit, recorded, executed)) if are_lists else True

    def settle(self, size: int | torch.SymInt) -> None:
        """Note that a recorded size is always the same, which its expression does not show: the graph reads
        it as a given number.
        """
        if isinstance(size, torch.SymInt):
            self._settled.add(size.node.expr)

    def varies(self, size: int | torch.SymInt) -> bool:
        """Whether a recorded size varies from call to call."""
        return is_dynamic(size) and size.node.expr not in self._settled

    def factored(self, recorded: int | torch.SymInt, value: int) -> Size:
        """A size as a product; ``value`` is what it is here, which in a rewritten graph can be less than what
        was recorded.
        """
        if not isinstance(recorded, torch.SymInt) or not self.varies(recorded):
            return Size.fixed(value)
        self._assign(recorded)
        times: Counter[sympy.Expr] = Counter()
        for factor in set(recorded.node.expr.as_coeff_mul()[1]) - self._settled:
            base, power = factor.as_base_exp()
            is_power = power.is_Integer and power > 0
            times[base if is_power else factor] += int(power) if is_power else 1
        symbols = math.prod(int(factor.xreplace(self.assigned)) ** power for factor, power in times.items())
        if not symbols or value % symbols:
            return Size(1, frozenset({(recorded.node.expr, 1)}), value)
        return Size(value // symbols, frozenset(times.items()), value)

    def concrete(self, value: Any) -> Any:
        """The recorded value of a node with every symbolic size replaced; tensors become empty ones of that
        shape.
        """

        def concrete(leaf: Tensor | torch.SymInt) -> Tensor | int:
            if isinstance(leaf, torch.SymInt):
                return self.integer(leaf)
            return torch.empty(list(map(self.integer, leaf.shape)), dtype=leaf.dtype, device=leaf.device)

        return pytree.tree_map_only((Tensor, torch.SymInt), concrete, value)


# --- Which dimensions of the inputs vary from call to call.


def widened(inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Inputs of batch size 1 doubled, since the exporter takes a size of 1 for a constant."""
    if not all(tensor.dim() and tensor.shape[0] == 1 for tensor in tensors_in(inputs)):
        return None
    return pytree.tree_map(lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf, inputs)


def shapes_of_inputs(exported: ExportedProgram) -> Iterator[tuple[str, Sequence[Any]]]:
    """Name and recorded shape of the caller's inputs of a program, in order; empty for what is no tensor."""
    recorded = {node.name: node.meta.get("val") for node in exported.graph.find_nodes(op="placeholder")}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            yield spec.arg.name, getattr(recorded.get(spec.arg.name), "shape", ())


def takes_any_number(exported: ExportedProgram) -> bool:
    """Whether the first dimension of every input of a program varies."""
    return all(is_dynamic(shape[0]) for _, shape in shapes_of_inputs(exported) if shape)


def images_of(arguments: Iterable[Any]) -> set[int]:
    """The arguments that are images or films, by identity: floating-point tensors of four dimensions and
    more, as wide as no tensor of integers is long.

    They vary in number only: conditions on every height and width can take an exporter minutes to simplify. A
    mask over tokens is as wide as they are many; a cache is no argument by itself.
    """
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    lengths = {size for tensor in tensors if not tensor.is_floating_point() for size in tensor.shape}
    return {
        id(tensor)
        for tensor in tensors
        if tensor.is_floating_point() and tensor.dim() >= 4 and tensor.shape[-1] not in lengths
    }


#: dimensions of the leaves of a call, as (leaf, dimension)
_Places = frozenset[tuple[int, int]]


def _collection(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    fixed: _Places = frozenset(),
    *,
    most: float = math.inf,
    spare_images: bool = False,
) -> ShapesCollection:
    """What varies: so many first dimensions of every tensor, of images that are spared one, but for the
    places that are fixed.
    """
    collection = ShapesCollection()
    images = images_of((*args, *kwargs.values())) if spare_images else ()
    for index, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
        if isinstance(leaf, Tensor):
            count = min(most, 1) if id(leaf) in images else most
            collection[leaf] = {
                dim: Dim.AUTO if dim < count and (index, dim) not in fixed else Dim.STATIC
                for dim in range(leaf.dim())
            }
    return collection


#: every dimension of every argument; of images the first; the first of each
every_dim, all_dims, first_dim = (
    partial(_collection),
    partial(_collection, spare_images=True),
    partial(_collection, most=1),
)


def of_features(exported: ExportedProgram) -> _Places:
    """Dimensions of inputs, as (position, dimension), that are features rather than batches or lengths.

    Of some the sizes may vary only against each other, because their sum is fixed: where one ends decides
    which weights meet the next. Others are tied to a weight by what strides leave of them (frequencies of
    speech after convolutions, ``5 * ((size - 1) // 2) + 5 == 15``), so that few sizes do.
    """
    sizes = {
        (index, dim): size
        for index, (_, shape) in enumerate(shapes_of_inputs(exported))
        for dim, size in enumerate(shape)
        if isinstance(size, torch.SymInt)
    }
    tied: set[Any] = set()
    for size in sizes.values():
        expression = size.node.expr
        constant, rest = expression.as_coeff_Add()
        if constant > 0 and rest and all(part.as_coeff_Mul()[0] < 0 for part in sympy.Add.make_args(rest)):
            tied |= expression.free_symbols
    varying = next(filter(is_dynamic, sizes.values()), None)
    tied.update(() if varying is None else _tied_to_weights(varying))
    return frozenset(place for place, size in sizes.items() if size.node.expr.free_symbols & tied)


def _tied_to_weights(size: torch.SymInt) -> Iterator[Any]:
    """The sizes that a capture allows only where so many channels, times what division leaves of one of them,
    are a fixed number.
    """
    for condition in conditions_on(size.node.shape_env):
        for product, fixed in (condition.args, condition.args[::-1]):
            functions = {type(part).__name__ for part in product.atoms(sympy.Function)}
            channels, _ = product.as_content_primitive()
            if (
                isinstance(condition, sympy.Eq)
                and fixed.is_Integer
                and functions == {"FloorDiv"}
                and len(product.free_symbols) == 1
                and channels > 1
            ):
                yield from product.free_symbols


def _range(expression: sympy.Expr, environment: Any) -> tuple[int, int | None]:
    """The smallest size that the capture had in mind for a symbol, and the largest that it allows, if any."""
    lower, upper = bounds_of(expression, environment)
    return lower or 0, upper if upper is not None and upper < torch.iinfo(torch.int32).max else None


def upper_bound(size: torch.SymInt) -> int | None:
    """The largest value that the capture allows for a dynamic size, or ``None`` if there is no limit."""
    return _range(size.node.expr, size.node.shape_env)[1]


def lower_bound(size: torch.SymInt) -> int:
    """The smallest value that the capture had in mind for a dynamic size."""
    return _range(size.node.expr, size.node.shape_env)[0]


def _recorded(size: int | torch.SymInt, settled: bool) -> Any:
    if is_dynamic(size):
        upper = upper_bound(size)
        return Dim.AUTO if upper is None else Dim.AUTO(max=upper)
    return Dim.AUTO if settled and isinstance(size, torch.SymInt) else Dim.STATIC


def recorded_shapes(
    graph: fx.Graph, example: tuple[tuple[Any, ...], dict[str, Any]], settled: bool = False
) -> ShapesCollection:
    """The dynamic dimensions of a captured program and their ranges, to export it again with the same
    freedom.

    Args:
        settled: whether those count that could vary until the capture settled them.
    """
    collection = ShapesCollection()
    for node, leaf in zip(graph.find_nodes(op="placeholder"), pytree.tree_leaves(example), strict=True):
        if isinstance(leaf, Tensor):
            sizes = node.meta["val"].shape
            collection[leaf] = {dim: _recorded(size, settled) for dim, size in enumerate(sizes)}
    return collection
