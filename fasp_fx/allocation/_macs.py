"""Multiply-accumulates of a program, operator by operator, as a function of what its groups lose.

They are half of the floating-point operations that ``torch.utils.flop_counter`` counts of the same products.
It counts none in products of a matrix with a vector, in bilinear maps, and in the CPU's kernels for attention
and recurrent layers; these are counted here as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..analysis._counting import Products, Size, Widest
from ..analysis.resources import Counted, ShrinkingSizes
from ..base._tolerable import tolerable
from ..base.compat import HigherOrderOperator, OpOverload
from ..capturing._fx import arguments, attribute
from ..capturing._record import record
from ..capturing._sizes import Sizes
from ..errors import BudgetError

if TYPE_CHECKING:
    from ..analysis._analysis import Analysis

#: one dimension of what a node makes, negative ones from the last
Dim = tuple[fx.Node, int]


class Padded(NamedTuple):
    """A dimension that the passes pad to the size of another, where that is larger
    (:class:`fasp_fx.passes.attention.PadValueHeads`).
    """

    own: Dim
    other: Dim


#: dimensions whose sizes are multiplied
Term = list[Dim | Padded]
#: the shape of what a node makes
ShapeOf = Callable[[fx.Node], tuple[int, ...]]
Formula = Callable[[fx.Node, dict[str, Any], ShapeOf], list[Term]]


def macs_of(analysis: Analysis) -> Counted:
    """Multiply-accumulates of one forward pass on the example inputs.

    Raises:
        BudgetError: an operator multiplies in a way that is not counted; names it.
    """
    left, shapes, sizes, dense = Products(), _ExampleShapes(analysis), ShrinkingSizes(analysis), 0

    def size(dim: Dim) -> Size:
        return sizes.of(dim[0], shapes(dim[0]), dim[1])

    for node in _calls(analysis.program.module.graph):
        for term in _terms(node, analysis.program.module, shapes):
            left.add(
                [
                    Widest((size(item.own), size(item.other))) if isinstance(item, Padded) else size(item)
                    for item in term
                ]
            )
            dense += math.prod(size(item.own if isinstance(item, Padded) else item).whole for item in term)
    return Counted(analysis, left, dense)


class _ExampleShapes:
    """The shapes of what nodes make, at the sizes of the example inputs.

    The analysis runs at small sizes where it can, so shapes are read from what the capture recorded.
    """

    def __init__(self, analysis: Analysis) -> None:
        self._program, self._sizes = analysis.program, Sizes(analysis.program.module, small=False)
        self._again: dict[fx.Node, Any] = {}

    def __call__(self, node: fx.Node) -> tuple[int, ...]:
        if node.op == "get_attr":
            return tuple(map(int, attribute(self._program.module, str(node.target)).shape))
        value = node.meta.get("val")
        if value is None:  # of a node that a pass has made
            value = self._recorded()[node]
        return tuple(self._sizes.integer(size) for size in value.shape)

    def _recorded(self) -> dict[fx.Node, Any]:
        if not self._again:
            copy = self._program.copy()
            record(copy.module)
            nodes = zip(self._program.module.graph.nodes, copy.module.graph.nodes, strict=True)
            self._again = {node: copied.meta.get("val") for node, copied in nodes}
        return self._again


def _calls(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "call_function")


def _every(node: fx.Node, shape: ShapeOf, *but: int) -> list[Dim]:
    """All dimensions of what a node makes, but for some."""
    rank = len(shape(node))
    return [(node, dim) for dim in range(rank) if dim - rank not in but]


def _product(first: str, second: str) -> Formula:
    """Rows and columns of one operand times the columns of the other."""
    return lambda node, given, shape: [[*_every(given[first], shape), (given[second], -1)]]


def _matmul(node: fx.Node, given: dict[str, Any], shape: ShapeOf) -> list[Term]:
    return [[*_every(node, shape), (given["self"], -1)]]


def _linear(node: fx.Node, given: dict[str, Any], shape: ShapeOf) -> list[Term]:
    return [[*_every(given["input"], shape), (given["weight"], 0)]]


def _bilinear(node: fx.Node, given: dict[str, Any], shape: ShapeOf) -> list[Term]:
    return [[*_every(given["input1"], shape), (given["weight"], 0), (given["weight"], 2)]]


def _convolution(rank: int, transposed: bool) -> Formula:
    """The whole kernel at every position of the output, or, where it is transposed, of the input."""

    def terms(node: fx.Node, given: dict[str, Any], shape: ShapeOf) -> list[Term]:
        return [
            [
                *_every(given["weight"], shape),
                *_every(given["input"] if transposed else node, shape, -rank - 1),
            ]
        ]

    return terms


def _attention(node: fx.Node, given: dict[str, Any], shape: ShapeOf) -> list[Term]:
    """A product with the keys and one with the values, for each query and each key."""
    scores = [*_every(given["query"], shape, -1), (given["key"], -2)]
    return [[*scores, (given["query"], -1)], [*scores, (given["value"], -1)]]


def _fused_attention(node: fx.Node, given: dict[str, Any], shape: ShapeOf) -> list[Term]:
    """The same; heads of queries and of values are of one width once the passes have run."""
    scores = [*_every(given["query"], shape, -1), (given["key"], -2)]
    query, value = (given["query"], -1), (given["value"], -1)
    return [[*scores, Padded(query, value)], [*scores, Padded(value, query)]]


def _experts(node: fx.Node, given: dict[str, Any], shape: ShapeOf) -> list[Term]:
    return [[*_every(given["input"], shape), (given["weight"], 2)]]


def _recurrent(node: fx.Node, given: dict[str, Any], shape: ShapeOf) -> list[Term]:
    """Every matrix at every step of every sequence."""
    matrices = [weight for weight in given["params"] if len(shape(weight)) == 2]
    return [[*_every(given["input"], shape, -1), *_every(weight, shape)] for weight in matrices]


_FORMULAS: dict[str, Formula] = {
    "aten.linear.default": _linear,
    "aten.bilinear.default": _bilinear,
    "aten.matmul.default": _matmul,
    "aten.mm.default": _product("self", "mat2"),
    "aten.bmm.default": _product("self", "mat2"),
    "aten.addmm.default": _product("mat1", "mat2"),
    "aten.baddbmm.default": _product("batch1", "batch2"),
    "aten.mv.default": lambda node, given, shape: [[*_every(given["self"], shape)]],
    "aten.dot.default": lambda node, given, shape: [[*_every(given["self"], shape)]],
    "aten.scaled_dot_product_attention.default": _fused_attention,
    "flex_attention": _attention,
    **{
        f"aten.conv{rank}d.{overload}": _convolution(rank, False)
        for rank in (1, 2, 3)
        for overload in ("default", "padding")
    },
    "aten.conv_transpose1d.default": _convolution(1, True),
    "aten.conv_transpose2d.input": _convolution(2, True),
    "aten.conv_transpose3d.input": _convolution(3, True),
    "transformers.grouped_mm_fallback.default": _experts,
    **{f"aten.{kind}.input": _recurrent for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}


def _terms(node: fx.Node, module: torch.nn.Module, shape: ShapeOf) -> list[Term]:
    """The products of sizes that one call takes."""
    formula = _FORMULAS.get(str(node.target))
    if formula is not None:
        return formula(node, arguments(node), shape)
    if isinstance(node.target, OpOverload) and (
        node.target._overloadpacket in flop_registry or _is_made_of_products(node, shape)
    ):
        raise BudgetError(
            f"the multiply-accumulates of '{node.name}' ({node.target}) are not counted, so macs are no"
            " budget here; use another"
        )
    if isinstance(node.target, HigherOrderOperator):
        for source in node.all_input_nodes:
            inner = attribute(module, str(source.target)) if source.op == "get_attr" else None
            if isinstance(inner, fx.GraphModule) and any(map(_multiplies, _calls(inner.graph))):
                raise BudgetError(
                    f"how often '{node.name}' ({node.target}) multiplies is decided at run time, so macs are"
                    " no budget here; use another"
                )
    return []


def _is_made_of_products(node: fx.Node, shape: ShapeOf) -> bool:
    """Whether an operator that stands for others has some that torch counts among them, such as
    ``aten.inner``.
    """
    assert isinstance(node.target, OpOverload)
    if not node.target._can_decompose():
        return False

    def empty(source: fx.Node) -> Any:
        value = source.meta.get("val")
        return (
            torch.empty(shape(source), dtype=value.dtype, device="meta")
            if isinstance(value, torch.Tensor)
            else value
        )

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), empty)
    with FlopCounterMode(display=False) as counter:
        try:
            node.target(*args, **kwargs)
        except tolerable(Exception):  # it needs more than shapes, as no product of matrices does
            return False
    return counter.get_total_flops() > 0


def _multiplies(node: fx.Node) -> bool:
    counted = isinstance(node.target, OpOverload) and node.target._overloadpacket in flop_registry
    return counted or str(node.target) in _FORMULAS or isinstance(node.target, HigherOrderOperator)


__all__ = ["macs_of"]
