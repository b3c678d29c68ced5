"""Budgets: how much of a resource may stay, for :func:`fasp_fx.prune` and its kin to keep to."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fasp_fx.analysis import (
    Counted,
    Products,
    Resource,
    ShrinkingSizes,
    Size,
    Sparsity,
    Widest,
    cache_of,
    parameters_of,
)
from fasp_fx.base import HigherOrderOperator, OpOverload, is_composite, is_number, tolerable
from fasp_fx.capturing import Sizes, arguments, attribute
from fasp_fx.errors import ArgumentError, BudgetError

if TYPE_CHECKING:
    from fasp_fx.analysis import Analysis, Group


@dataclass(frozen=True)
class Cap(ABC):
    """How much of one resource may stay.

    Attributes:
        amount: a float in (0, 1]: that share of what the dense model has; an int from 2 on, or a larger
            float: so much.
        name: of the resource, as options and reports call it.

    Raises:
        ArgumentError: the amount is no positive number, or the int 1, which says neither one nor all.

    Examples:
        >>> from fasp_fx.allocation import Cap, Macs
        >>> print(Macs(0.5).name, issubclass(Macs, Cap))
        macs True
    """

    amount: float
    name: ClassVar[str]
    #: what one of it is called, several of them
    unit: ClassVar[str]
    #: whether a submodule that is called several times takes it each time
    per_call: ClassVar[bool] = False

    def __post_init__(self) -> None:
        is_one = self.amount == 1 and isinstance(self.amount, int)  # one alone, or all
        if not is_number(self.amount) or self.amount <= 0 or is_one:
            raise ArgumentError(
                f"{self} is no budget; give a share in (0, 1], such as 0.8, or 1.0 for all, or how much may"
                " stay, such as 100_000_000"
            )

    def allowed(self, dense: float) -> float:
        """How much may stay of ``dense``."""
        return self.amount * dense if isinstance(self.amount, float) and self.amount <= 1 else self.amount

    def held(self, weights: Iterable[Tensor]) -> float:
        """How much there is of it in weights that no program of a model has."""
        return 0

    @abstractmethod
    def resource(self, analysis: Analysis) -> Resource:
        """What is counted of an analysed program.

        Raises:
            BudgetError: it cannot be counted of this one.
        """


class Parameters(Cap):
    """The number of all parameters, tied ones once, as the report's line ``parameters`` has them.

    Examples:
        >>> from fasp_fx.allocation import Parameters
        >>> fasp_fx.prune(captured, calibration=batches, budget=Parameters(600)).report.parameters
        (884, 584)
    """

    name, unit = "parameters", "parameters"

    def each(self, weight: Tensor) -> float:
        """How much of it each number of a weight is."""
        return 1

    def resource(self, analysis: Analysis) -> Resource:
        return parameters_of(analysis, self.each)

    def held(self, weights: Iterable[Tensor]) -> float:
        return sum(weight.numel() * self.each(weight) for weight in weights)


@dataclass(frozen=True)
class Bytes(Parameters):
    """The bytes of all parameters, tied ones once, as the report's line ``bytes`` has them: with a format of
    GGUF files, those that the file takes for them.

    Attributes:
        stored: how many bytes each number of a weight takes; ``None``: as many as in the model, or in the
            file of the format.

    Examples:
        >>> from fasp_fx.allocation import Bytes
        >>> fasp_fx.prune(captured, calibration=batches, budget=Bytes(0.75)).report.bytes
        (3536, 2636)
    """

    stored: Callable[[Tensor], float] | None = field(default=None, compare=False, repr=False)
    name: ClassVar[str] = "bytes"
    unit: ClassVar[str] = "bytes"

    def each(self, weight: Tensor) -> float:
        return weight.element_size() if self.stored is None else self.stored(weight)


class Macs(Cap):
    """The multiply-accumulates of one forward pass on the example inputs: of linear, convolution and
    recurrent operators, products of matrices, and the two products of attention, whole where a mask hides
    half of them, with heads padded to one width as the result has them. They are half of the operations that
    ``torch.utils.flop_counter`` counts.

    :func:`fasp_fx.hf.prune` has example inputs of its own: 2 sequences of 3 tokens that follow 5 others. Of a
    model that is pruned in parts, those of the parts are counted, as often as each is called.

    Examples:
        >>> from fasp_fx.allocation import Macs, Parameters
        >>> both = fasp_fx.prune(captured, calibration=batches, budget=(Macs(0.7), Parameters(800)))
        >>> [spent.used <= spent.allowed for spent in both.report.budgets]
        [True, True]
    """

    name, unit, per_call = "macs", "multiply-accumulates", True

    def resource(self, analysis: Analysis) -> Resource:
        return macs_of(analysis)


class CacheBytes(Cap):
    """The bytes that the key-value cache takes per token of one sequence, as the report's line ``cache`` has
    them: those of a context, divided by its tokens.

    Examples:
        >>> from fasp_fx.allocation import CacheBytes
        >>> CacheBytes(2**31 // 8192).amount  # 2 GiB at a context of 8,192 tokens; for fasp_fx.hf.prune
        262144
    """

    name, unit = "cache-bytes", "bytes of cache per token"

    def resource(self, analysis: Analysis) -> Resource:
        return cache_of(analysis)


@dataclass(frozen=True)
class Latency(Cap):
    """The microseconds of whatever is to be fast, as a function of yours predicts them
    (``examples/latency.py`` measures one).

    Attributes:
        seconds: called with the width that is left of each block of each group that can lose channels, by the
            group's name, and returns seconds. It is asked thousands of times in one pruning: look times up,
            rather than measure there. More width may never take less time than less of it.

    Examples:
        >>> from fasp_fx.allocation import Latency
        >>> budget = Latency(0.8, lambda widths: 1e-6 * sum(widths.values()))
        >>> (spent,) = fasp_fx.prune(captured, calibration=batches, budget=budget).report.budgets
        >>> print(f"{spent.used:.0f} of {spent.dense:.0f} microseconds")
        38 of 48 microseconds
    """

    seconds: Callable[[Mapping[str, int]], float] = field(compare=False, repr=False)
    name: ClassVar[str] = "latency"
    unit: ClassVar[str] = "microseconds"

    def resource(self, analysis: Analysis) -> Resource:
        return Microseconds(analysis.chosen, self.seconds)


class Microseconds(Resource):
    """The microseconds that a function of the widths predicts.

    Args:
        groups: the groups that can lose channel sets.
        seconds: as for :class:`Latency`.
    """

    def __init__(self, groups: Sequence[Group], seconds: Callable[[Mapping[str, int]], float]) -> None:
        self._seconds, self.groups = seconds, list(groups)
        super().__init__(groups, self.used([0] * len(groups)))

    def used(self, lost: Sequence[int]) -> float:
        pairs = zip(self.groups, lost, strict=True)
        return 1e6 * self._seconds({group.name: group.width - gone // group.blocks for group, gone in pairs})


#: every kind of budget that can be stored, by its name
KINDS: dict[str, type[Cap]] = {kind.name: kind for kind in (Parameters, Macs, Bytes, CacheBytes)}


def counted(analysis: Analysis, cap: Cap | None) -> Resource:
    """What a budget counts of a program; ``None``: what sparsity is a fraction of."""
    return Sparsity(analysis) if cap is None else cap.resource(analysis)


def read_budget(given: Any) -> tuple[Cap, ...]:
    """The budgets that an option was given: one or several.

    Raises:
        ArgumentError: it is something else, or two budgets are of one resource.
    """
    caps = tuple(given) if isinstance(given, Iterable) else (given,)
    for cap in caps:
        if not isinstance(cap, Cap):
            raise ArgumentError(
                f"budget={cap!r} is no budget; pass one of fasp_fx.allocation, such as Parameters(0.8), or a"
                " tuple of them"
            )
    if len({cap.name for cap in caps}) < len(caps):
        raise ArgumentError(f"budget={caps!r} speaks of one resource twice; keep the smaller one")
    return caps


def budget_data(caps: Sequence[Cap]) -> list[dict[str, Any]]:
    """Budgets as the plain data that :func:`budget_from_data` reads.

    Raises:
        ArgumentError: one is of a class that is not defined here.
    """
    for cap in caps:
        if KINDS.get(cap.name) is not type(cap):
            raise ArgumentError(
                f"{cap} is a budget of your own, which cannot be stored; keep it in code and pass it again"
            )
    return [{"resource": cap.name, "amount": cap.amount} for cap in caps]


def budget_from_data(data: Any) -> tuple[Cap, ...]:
    """The budgets that :func:`budget_data` wrote.

    Raises:
        ArgumentError: these are none.
    """
    try:
        return read_budget([KINDS[item["resource"]](item["amount"]) for item in data])
    except (KeyError, TypeError) as error:
        raise ArgumentError(
            f"budget={data!r:.80} is none; each names one of {', '.join(map(repr, KINDS))} as 'resource', and"
            " an 'amount'"
        ) from error


#: one dimension of what a node makes, negative ones from the last
Dim = tuple[fx.Node, int]
#: dimensions whose sizes are multiplied; of several in one place the largest, which the passes pad the others
#: to (``pad_value_heads`` in ``passes/_attention.py``)
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
    "aten._grouped_mm.default": [[("self", ALL), ("mat2", 2)]],
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
    left, shapes, sizes, dense = Products(), _example_shapes(analysis), ShrinkingSizes(analysis), 0

    def size(dim: Dim) -> Size:
        return sizes.of(dim[0], shapes(dim[0]), dim[1])

    for node in _calls(analysis.program.module.graph):
        for term in _terms(node, analysis.program.module, shapes):
            factors = [[size(dim) for dim in dims] for dims in term]
            left.add([own[0] if len(own) == 1 else Widest(tuple(own)) for own in factors])
            dense += math.prod(own[0].whole for own in factors)
    return Counted(analysis, left, dense)


def _example_shapes(analysis: Analysis) -> ShapeOf:
    """The shapes of what nodes make, at the sizes of the example inputs, as the capture recorded them; the
    analysis runs at small sizes where it can.
    """
    module, sizes = analysis.program.module, Sizes(analysis.program.module, small=False)

    def shape(node: fx.Node) -> tuple[int, ...]:
        value = attribute(module, str(node.target)) if node.op == "get_attr" else node.meta["val"]
        return tuple(sizes.integer(size) for size in value.shape)

    return shape


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
        node.target.overloadpacket in flop_registry or _is_made_of_products(node, shape)
    ):
        raise BudgetError(
            f"the multiply-accumulates of '{node.name}' ({node.target}) are not counted, so macs are no"
            " budget here; use another"
        )
    if isinstance(node.target, HigherOrderOperator):
        inner = [attribute(module, str(one.target)) for one in node.all_input_nodes if one.op == "get_attr"]
        if any(isinstance(one, fx.GraphModule) for one in inner):
            raise BudgetError(
                f"how often '{node.name}' ({node.target}) multiplies is decided at run time, so macs are no"
                " budget here; use another"
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
    if not is_composite(node.target):
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


__all__ = ["Bytes", "CacheBytes", "Cap", "Latency", "Macs", "Parameters", "counted", "macs_of"]
