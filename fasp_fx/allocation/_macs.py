"""Multiply-accumulates of a program, operator by operator, as a function of what its groups lose.

They are half of the floating-point operations that ``torch.utils.flop_counter`` counts of the same products.
It counts none in products of a matrix with a vector, in bilinear maps, and in the CPU's kernels for attention
and recurrent layers; these are counted here as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

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
#: dimensions whose sizes are multiplied; of several in one place the largest, which the passes pad the others
#: to (:class:`fasp_fx.passes.attention.PadValueHeads`)
Term = list[tuple[Dim, ...]]
#: the shape of what a node makes
ShapeOf = Callable[[fx.Node], tuple[int, ...]]

#: of an argument, or the widest of several, one dimension, or all but some
Factor = tuple[str | tuple[str, ...], int | tuple[int, ...]]
#: all dimensions of an argument, and all but the last
ALL: tuple[int, ...] = ()
BUT_LAST: tuple[int, ...] = (-1,)
_SCORES: list[Factor] = [("query", BUT_LAST), ("key", -2)]
_FUSED = ("query", "value")  # heads of both are of one width once the passes have run
#: products of sizes by operator: of each argument (``out``: the result) one dimension, or all but some; the
#: whole kernel of a convolution at every position of its output, or, where it is transposed, of its input;
#: attention's products with keys and with values; every matrix of a recurrent layer at every step
_FORMULAS: dict[str, list[list[Factor]]] = {
    "aten.linear.default": [[("input", ALL), ("weight", 0)]],
    "aten.bilinear.default": [[("input1", ALL), ("weight", 0), ("weight", 2)]],
    "aten.matmul.default": [[("out", ALL), ("self", -1)]],
    "aten.mm.default": [[("self", ALL), ("mat2", -1)]],
    "aten.bmm.default": [[("self", ALL), ("mat2", -1)]],
    "aten.addmm.default": [[("mat1", ALL), ("mat2", -1)]],
    "aten.baddbmm.default": [[("batch1", ALL), ("batch2", -1)]],
    "aten.mv.default": [[("self", ALL)]],
    "aten.dot.default": [[("self", ALL)]],
    "aten.scaled_dot_product_attention.default": [[*_SCORES, (_FUSED, -1)], [*_SCORES, (_FUSED[::-1], -1)]],
    "flex_attention": [[*_SCORES, ("query", -1)], [*_SCORES, ("value", -1)]],
    **{
        f"aten.conv{rank}d.{overload}": [[("weight", ALL), ("out", (-rank - 1,))]]
        for rank in (1, 2, 3)
        for overload in ("default", "padding")
    },
    **{
        f"aten.conv_transpose{rank}d.{'default' if rank == 1 else 'input'}": [
            [("weight", ALL), ("input", (-rank - 1,))]
        ]
        for rank in (1, 2, 3)
    },
    "transformers.grouped_mm_fallback.default": [[("input", ALL), ("weight", 2)]],
    **{
        f"aten.{kind}.input": [[("input", BUT_LAST), ("params", ALL)]]
        for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    },
}


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
            factors = [[size(dim) for dim in dims] for dims in term]
            left.add([own[0] if len(own) == 1 else Widest(tuple(own)) for own in factors])
            dense += math.prod(own[0].whole for own in factors)
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


def _terms(node: fx.Node, module: torch.nn.Module, shape: ShapeOf) -> list[Term]:
    """The products of sizes that one call takes."""
    formula = _FORMULAS.get(str(node.target))
    if formula is not None:
        given = {**arguments(node), "out": node}
        # The matrices of a recurrent layer come in one argument, among its biases.
        each = [matrix for matrix in given.get("params", ()) if len(shape(matrix)) == 2] or [None]
        return [_dims({**given, "params": matrix}, term, shape) for term in formula for matrix in each]
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


def _dims(given: dict[str, Any], term: list[Factor], shape: ShapeOf) -> Term:
    """The dimensions of one product of sizes, of the arguments of a call."""
    found: Term = []
    for names, which in term:
        sources = [given[name] for name in ([names] if isinstance(names, str) else names)]
        rank = len(shape(sources[0]))
        dims = [which] if isinstance(which, int) else [dim for dim in range(rank) if dim - rank not in which]
        found += [tuple((source, dim) for source in sources) for dim in dims]
    return found


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
