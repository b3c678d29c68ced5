"""Which dimensions of the inputs vary from call to call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, TensorArgument

from ..base.compat import int_oo, pytree
from ._sizes import is_dynamic


def widened(given: dict[str, Any]) -> dict[str, Any] | None:
    """Inputs of batch size 1 doubled, since the exporter takes a size of 1 for a constant."""
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    if not all(tensor.dim() and tensor.shape[0] == 1 for tensor in tensors):
        return None
    return pytree.tree_map(lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf, given)


def takes_any_number(exported: ExportedProgram) -> bool:
    """Whether the first dimension of every input of a program varies."""
    nodes = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    recorded = [nodes[name].meta["val"] for name in exported.graph_signature.user_inputs if name in nodes]
    return all(is_dynamic(value.shape[0]) for value in recorded if isinstance(value, Tensor))


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


def _collection(
    args: tuple[Any, ...], kwargs: dict[str, Any], dims: int | None, images: set[int]
) -> ShapesCollection:
    collection = ShapesCollection()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            count = leaf.dim() if dims is None else min(dims, leaf.dim())
            count = min(count, 1) if id(leaf) in images else count
            collection[leaf] = {dim: Dim.AUTO if dim < count else Dim.STATIC for dim in range(leaf.dim())}
    return collection


def all_dims(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShapesCollection:
    return _collection(args, kwargs, None, images_of((*args, *kwargs.values())))


def every_dim(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShapesCollection:
    return _collection(args, kwargs, None, set())


def first_dim(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShapesCollection:
    return _collection(args, kwargs, 1, set())


def of_features(exported: ExportedProgram) -> frozenset[tuple[int, int]]:
    """Dimensions of inputs, as (position, dimension), that are features rather than batches or lengths.

    Of some the sizes may vary only against each other, because their sum is fixed: where one ends decides
    which weights meet the next. Others are tied to a weight by what strides leave of them (frequencies of
    speech after convolutions, ``5 * ((size - 1) // 2) + 5 == 15``), so that few sizes do.
    """
    given = [spec.arg for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    recorded = {
        node.name: node.meta["val"].shape
        for node in exported.graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), Tensor)
    }
    sizes = {
        (index, dim): size.node.expr
        for index, argument in enumerate(given)
        if isinstance(argument, TensorArgument)
        for dim, size in enumerate(recorded[argument.name])
        if isinstance(size, torch.SymInt)
    }
    tied: set[Any] = set()
    for expression in sizes.values():
        constant, rest = expression.as_coeff_Add()
        if constant > 0 and rest and all(part.as_coeff_Mul()[0] < 0 for part in sympy.Add.make_args(rest)):
            tied |= expression.free_symbols
    varying = next((size for shape in recorded.values() for size in shape if is_dynamic(size)), None)
    tied.update(() if varying is None else _tied_to_weights(varying))
    return frozenset(place for place, expression in sizes.items() if expression.free_symbols & tied)


def _tied_to_weights(size: torch.SymInt) -> Iterator[Any]:
    """The sizes that a capture allows only where so many channels, times what division leaves of one of them,
    are a fixed number.
    """
    for guard in size.node.shape_env.guards:
        if not isinstance(guard.expr, sympy.Eq):
            continue
        for made, fixed in (guard.expr.args, guard.expr.args[::-1]):
            functions = {type(part).__name__ for part in made.atoms(sympy.Function)}
            channels, _ = made.as_content_primitive()
            if (
                fixed.is_Integer
                and functions == {"FloorDiv"}
                and len(made.free_symbols) == 1
                and channels > 1
            ):
                yield from made.free_symbols


def with_static(
    shapes: Callable[..., ShapesCollection],
    fixed: frozenset[tuple[int, int]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> ShapesCollection:
    """What ``shapes`` lets vary, but for these dimensions."""
    collection = shapes(args, kwargs)
    for index, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
        for dim in [dim for position, dim in fixed if position == index]:
            collection[leaf][dim] = Dim.STATIC
    return collection


def upper_bound(size: torch.SymInt) -> int | None:
    """The largest value that the capture allows for a dynamic size, or ``None`` if there is no limit."""
    expression, environment = size.node.expr, size.node.shape_env
    bounds = environment.var_to_range.get(expression) if expression.is_Symbol else None
    if bounds is None or bounds.upper in (int_oo, sympy.oo):
        return None
    return int(bounds.upper) if int(bounds.upper) < torch.iinfo(torch.int32).max else None


def lower_bound(size: torch.SymInt) -> int:
    """The smallest value that the capture had in mind for a dynamic size."""
    expression, environment = size.node.expr, size.node.shape_env
    bounds = environment.var_to_range.get(expression) if expression.is_Symbol else None
    return 0 if bounds is None or bounds.lower == -int_oo else int(bounds.lower)


def recorded_shapes(
    graph: fx.Graph, example: tuple[tuple[Any, ...], dict[str, Any]], settled: bool = False
) -> ShapesCollection:
    """The dynamic dimensions of a captured program and their ranges, to export it again with the same
    freedom.

    Args:
        settled: whether those count that could vary until the capture settled them.
    """
    collection = ShapesCollection()
    leaves = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    inputs = graph.find_nodes(op="placeholder")
    tensors = [node for node in inputs if isinstance(node.meta.get("val"), Tensor)]
    for node, leaf in zip(tensors, leaves, strict=True):
        spec: dict[int, Any] = {}
        for dim, size in enumerate(node.meta["val"].shape):
            if not is_dynamic(size):
                # A symbol that the capture settled is one still.
                spec[dim] = Dim.AUTO if settled and isinstance(size, torch.SymInt) else Dim.STATIC
                continue
            spec[dim] = Dim.AUTO
            upper = upper_bound(size)
            if upper is not None:
                spec[dim] = Dim.AUTO(max=upper)
        collection[leaf] = spec
    return collection
