"""Budgets: how much of a resource may stay, for :func:`fasp_fx.prune` and its kin to keep to."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fasp_fx.analysis import (
    Analysis,
    Counted,
    Group,
    Resource,
    ShrinkingSizes,
    Sparsity,
    cache_of,
    parameters_of,
)
from fasp_fx.base import HigherOrderOperator, OpOverload, is_composite, is_number, tolerable
from fasp_fx.capturing import Sizes, arguments, attribute, elements
from fasp_fx.errors import ArgumentError, BudgetError
from fasp_fx.patterns import ONE_WIDTH, Reading, letters_of, lookup, read


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
        if (
            not is_number(self.amount)
            or self.amount <= 0
            or (self.amount == 1 and isinstance(self.amount, int))  # one alone, or all
        ):
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
        (3536, 2336)
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
        36 of 48 microseconds
    """

    seconds: Callable[[Mapping[str, int]], float] | None = field(default=None, compare=False, repr=False)
    name: ClassVar[str] = "latency"
    unit: ClassVar[str] = "microseconds"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.seconds):
            raise ArgumentError(
                f"Latency({self.amount}) does not say what takes how long; pass seconds=, a function of the"
                " widths (docs/choosing.md)"
            )

    def resource(self, analysis: Analysis) -> Resource:
        return self.of(analysis.chosen)

    def of(self, groups: Sequence[Group]) -> Microseconds:
        """What is counted of the groups that can lose channel sets."""
        assert self.seconds is not None
        return Microseconds(groups, self.seconds)


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
        return 1e6 * self._seconds({group.name: group.width - sets // group.blocks for group, sets in pairs})


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


#: one dimension of what a node makes
Dim = tuple[fx.Node, int]
#: dimensions whose sizes are multiplied; of several in one place the largest, which the passes pad the others
#: to (``pad_value_heads`` in ``passes/_adjust.py``)
Term = list[tuple[Dim, ...]]
#: the shape of what a node makes
ShapeOf = Callable[[fx.Node], tuple[int, ...]]


def macs_of(analysis: Analysis) -> Counted:
    """Multiply-accumulates of one forward pass on the example inputs.

    Raises:
        BudgetError: an operator multiplies in a way that is not counted; names it.
    """
    program, left, sizes = analysis.program, Counted(analysis), ShrinkingSizes(analysis)
    # The analysis runs at small sizes where it can; these are those of the example inputs.
    recorded = Sizes(program.module, small=False)

    def shape(node: fx.Node) -> tuple[int, ...]:
        value = attribute(program.module, str(node.target)) if node.op == "get_attr" else node.meta["val"]
        return tuple(recorded.integer(size) for size in value.shape)

    for call in program.module.graph.nodes:
        for term in _terms(call, program.module, shape) if call.op == "call_function" else ():
            factors = [tuple(sizes.of(node, shape(node), dim) for node, dim in dims) for dims in term]
            left.add(factors)
            left.whole += math.prod(several[0].whole for several in factors)
    return left


def _terms(node: fx.Node, module: torch.nn.Module, shape: ShapeOf) -> list[Term]:
    """The products of sizes that one call takes."""
    rule, operands = lookup(node.target), elements(arguments(node))
    if rule is not None and rule.all("recur"):
        # Every matrix, of all layers and both ways, is multiplied at every step.
        tokens = operands[rule.alternatives[0].operands[0].name]
        steps = [(tokens, dim) for dim in range(len(shape(tokens)) - 1)]
        matrices = [each for name, each in operands.items() if "." in name and len(shape(each)) == 2]
        return [[(dim,) for dim in (*steps, (matrix, 0), (matrix, 1))] for matrix in matrices]
    if rule is not None and any(form.summed for form in rule.alternatives):
        names = {operand.name for form in rule.alternatives for operand in form.operands}
        tensors = {name: operand for name, operand in operands.items() if name in names}
        ranks = {name: len(shape(each)) for name, each in tensors.items() if isinstance(each, fx.Node)}
        reading = read(rule, arguments(node), ranks)
        return [_dims(node, reading, tensors, *product) for product in reading.products()]
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


def _dims(
    node: fx.Node, reading: Reading, tensors: Mapping[str, fx.Node], letters: frozenset[str], names: list[str]
) -> Term:
    """The dimensions that have each of some letters once, of some operands and the result."""
    places = {
        name: [(letters_of((letter,)), (tensors[name], dim)) for dim, letter in enumerate(dims)]
        for name, dims in reading.operands.items()
    }
    # Positions that a window slides over are those of the result, and what broadcasts is whole there.
    late = {letter for letter in letters if letter.startswith(".")} | reading.along("slide")
    early = [[place for place in places[name] if not late & {*place[0]}] for name in names]
    last = [(letters_of((letter,)), (node, dim)) for dim, letter in enumerate(reading.results[0])]
    for order in itertools.permutations([*early, last]):
        term: dict[tuple[str, ...], Dim] = {}
        for several, dim in itertools.chain(*order):
            if letters.difference(*term).issuperset(several):
                term[several] = dim
        if not letters.difference(*term):
            break
    else:
        raise BudgetError(
            f"the rule of '{node.name}' ({node.target}) does not say how often it multiplies, so macs are no"
            " budget here; use another"
        )
    # Where the passes make two sizes one, the larger of them counts.
    wide = ONE_WIDTH.get(str(node.target), ())
    widths = {several[0]: dim for place in places.values() for several, dim in place if several[0] in wide}
    return [
        (dim, *(width for letter, width in widths.items() if several[0] in wide and letter != several[0]))
        for several, dim in term.items()
    ]


def _is_made_of_products(node: fx.Node, shape: ShapeOf) -> bool:
    """Whether an operator that stands for others has some that torch counts among them, such as
    ``aten.inner``.
    """
    if not isinstance(node.target, OpOverload) or not is_composite(node.target):
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
