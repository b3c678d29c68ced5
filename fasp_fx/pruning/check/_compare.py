"""Whether two programs compute the same: in their own precision, and in a higher one where that leaves a
doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fasp_fx.base import (
    bounds_of,
    conditions_on,
    deviation,
    drawing_alike,
    for_a_while,
    hint_of,
    laid_otherwise,
    pytree,
    tolerable,
    tolerance,
)
from fasp_fx.capturing import (
    Guards,
    Program,
    attribute,
    coarsest,
    copied,
    is_dynamic,
    written_by,
    written_names,
)


@dataclass(frozen=True)
class Seen:
    """What one comparison came to.

    Attributes:
        deviation: max|a − b| / max|b| of the worst output, infinite where integers, shapes or the places of
            NaN and infinities differ.
        equal: whether the two compute the same but for rounding.
        alone: whether a doubt is left that no higher precision could settle, since nothing runs in one.
    """

    deviation: float
    equal: bool
    alone: bool = False


class ReferenceFailedError(Exception):
    """The masked dense program does not run on these inputs."""


def compare(reference: Program, module: fx.GraphModule, pruned: Program, inputs: Inputs) -> Seen:
    """Run the masked dense program and the pruned one on the same inputs.

    Args:
        module: the graph to run of the pruned program, whose example is that of ``pruned``.

    Raises:
        ReferenceFailedError: the dense program does not run on these inputs.
        Exception: what the pruned program raises.
    """
    # The second call sees what the first has left behind.
    calls = 2 if any(map(written_by, (*reference.module.graph.nodes, *module.graph.nodes))) else 1

    def look(precision: torch.dtype | None) -> float:
        try:
            expected = run(reference.module, inputs.of(reference), calls, precision)
        except tolerable(Exception) as error:  # a program raises what it likes
            raise ReferenceFailedError(str(error)) from error
        pairs = [
            pair
            for both in zip(run(module, inputs.of(pruned), calls, precision), expected, strict=True)
            for pair in enumerate(zip(*both, strict=True))
        ]
        state = reference.state_outputs  # which may be narrower, and is not compared then
        return max(
            (deviation(a, b) for index, (a, b) in pairs if index not in state or a.shape == b.shape),
            default=0.0,
        )

    return compare_with_escalation(look, coarsest(reference))


def compare_with_escalation(look: Callable[[torch.dtype | None], float], coarse: torch.dtype) -> Seen:
    """Compare two computations in their own precision, and in a higher one where that leaves a doubt, as
    types of 16 bits always do. Where none can be had, what passes is the little that would have left none.

    Args:
        look: their deviation in a precision, ``None`` being their own.
        coarse: the coarsest type in them.
    """
    is_half = torch.finfo(coarse).eps > torch.finfo(torch.float32).eps
    worst, last = look(None), coarse
    equal = worst <= tolerance("sums in another order", coarse)
    for dtype in (torch.float32, torch.float64) if is_half else (torch.float64,):
        if equal and not (is_half and last == coarse):
            break
        try:
            worst = look(dtype)
        except tolerable(Exception):  # there is no such precision here, or not for what is computed
            return Seen(worst, worst <= tolerance("no higher precision", last), alone=True)
        last, equal = dtype, worst <= tolerance("sums in another order", dtype)
    return Seen(worst, equal)


# --- Running a program as it is, or in a higher precision, without leaving a trace.


def run(
    module: fx.GraphModule, inputs: list[Any], calls: int, precision: torch.dtype | None
) -> list[list[Any]]:
    """Call a graph module several times in a row, with random numbers that start from zero; its outputs of
    each call.

    Inputs may be written into; buffers of the module are left as they are.

    Args:
        inputs: the values of its placeholders.
        calls: how often.
        precision: nothing is computed in a lower one that can be computed in this; weights are widened one by
            one as they are used. ``None``: as the program says.
    """
    arguments = [widened(value, precision) for value in inputs]
    written = {
        name: widened(attribute(module, name).detach().clone(), precision)
        for name in written_names(module.graph)
    }
    outputs = list[list[Any]]()
    # what a model compiles for itself (flex attention, say) runs uncompiled
    with (
        torch.no_grad(),
        drawing_alike([*arguments, *module.parameters(), *module.buffers()]),
        torch.compiler.set_stance("force_eager"),
        for_a_while(torch.get_default_dtype, torch.set_default_dtype),
    ):
        torch.set_default_dtype(widened(torch.get_default_dtype(), precision))
        for _ in range(calls):
            leaves = list(_Execution(module, precision, written).run(*arguments, enable_io_processing=False))
            outputs.append(copied(leaves) if calls > 1 else leaves)
    return outputs


def widened(value: Any, precision: torch.dtype | None) -> Any:
    """A type of real or complex numbers, or a tensor of it, in this precision if its own is lower; anything
    else as it is.
    """
    if isinstance(value, Tensor):
        return value.to(widened(value.dtype, precision))
    if (
        precision is None
        or not isinstance(value, torch.dtype)
        or not (value.is_floating_point or value.is_complex)
        or torch.finfo(value).eps <= torch.finfo(precision).eps
    ):
        return value
    return precision.to_complex() if value.is_complex else precision


class _Execution(fx.Interpreter):
    def __init__(
        self, module: fx.GraphModule, precision: torch.dtype | None, written: dict[str, Tensor]
    ) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.precision, self.written, self.extra_traceback = precision, written, False

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.written[target] if target in self.written else super().get_attr(target, args, kwargs)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        # Where it is read: a graph may name all of its weights before the first of them is used.
        return fx.map_arg(args, lambda node: widened(self.env[node], self.precision))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        is_guard = self.precision is not None and isinstance(self.fetch_attr(target), Guards)
        return None if is_guard else super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.precision is not None:
            args, kwargs = pytree.tree_map(lambda leaf: widened(leaf, self.precision), (args, kwargs))
        return super().call_function(target, args, kwargs)


# --- The inputs on which programs are compared.

#: sizes of a small run, all different so that none can stand for another; multiples of the usual divisors
#: among them
_SMALL = (3, 5, 7, 4, 6, 8, 9, 12, 16)
#: those of a batch, each sample of which is a run by itself
_BATCHES = (1, 3, 2, 4, 5, 6, 7, 8, 9)
#: positions behind which is looked as well: some things happen only there (causal attention, offsets)
_LONGER = 17
#: how many inputs of other sizes are offered at most
_OFFERED = 5
#: a size: the position of an input, and its dimension; ``None``: the value of an input that is a size itself
_Place = tuple[int, int | None]


@dataclass(frozen=True)
class Inputs:
    """A recipe for the inputs of one call, which serves the dense program and the pruned one, whose examples
    may be narrower.

    Attributes:
        text: the inputs in words.
        sizes: those that are not the example's.
        drawn: inputs to be filled with random numbers in [0, 1), because the example holds a single number
            everywhere.
        otherwise: whether inputs lie in memory otherwise than those of the example.
    """

    text: str = "on the example inputs"
    sizes: dict[_Place, int] = field(default_factory=dict)
    drawn: frozenset[int] = frozenset()
    otherwise: bool = False

    def of(self, program: Program) -> list[Any]:
        """The values of the placeholders of a program; tensors are copies, of which the entries of the
        example are repeated where a size grew.
        """
        return [self._made(index, leaf) for index, leaf in enumerate(pytree.tree_leaves(program.example))]

    def _made(self, index: int, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return self.sizes.get((index, None), leaf)
        tensor = leaf.detach()
        for dim, size in enumerate(leaf.shape):
            wanted = self.sizes.get((index, dim), size)
            if wanted != size and size:
                tensor = tensor.index_select(dim, torch.arange(wanted, device=leaf.device) % size)
            elif wanted != size:
                tensor = tensor.new_zeros([*tensor.shape[:dim], wanted, *tensor.shape[dim + 1 :]])
        if index in self.drawn:
            generator = torch.Generator(device="cpu").manual_seed(index)
            return torch.rand(tensor.shape, generator=generator, dtype=torch.float32, device="cpu").to(tensor)
        return laid_otherwise(tensor) if self.otherwise else _laid_like(leaf, tensor)


def _laid_like(leaf: Tensor, tensor: Tensor) -> Tensor:
    """A copy that is part of a larger tensor where the example is: a capture can ask for that."""
    if leaf.layout != torch.strided or not leaf.dim() or leaf.is_contiguous():
        return tensor.clone()
    if tensor.shape == leaf.shape and all(leaf.stride()):
        return tensor.new_empty_strided(leaf.shape, leaf.stride()).copy_(tensor)
    return tensor.new_empty([*tensor.shape[:-1], tensor.shape[-1] + 1])[..., :-1].copy_(tensor)


def inputs_for(program: Program) -> Iterator[Inputs]:
    """The example inputs, and others, the best ones first; none of these if no size can vary and no input
    holds a single number.

    They are small, so that they cost little beside a long example, the others for programs that do not run on
    those; on accelerators, where an index out of range cannot be caught, they are larger than the example.
    """
    yield Inputs()
    nodes, leaves = program.placeholders(), pytree.tree_leaves(program.example)
    drawn = frozenset(
        index
        for index, (node, leaf) in enumerate(zip(nodes, leaves))
        if isinstance(leaf, Tensor) and node.name not in program.state_inputs and _holds_one_number(leaf)
    )
    dynamic = _dynamic(program)
    for number, assigned in enumerate(_assignments(dynamic, grow=program.device().type != "cpu")[:_OFFERED]):
        sizes = {place: int(size.node.expr.xreplace(assigned)) for place, size in dynamic.items()}
        shown = ", ".join(
            f"{nodes[index].name}{'' if dim is None else f'[{dim}]'} = {size}"
            for (index, dim), size in sizes.items()
        )
        # An operator that takes no other layout gets sizes that lie as the example's.
        yield Inputs(f"on inputs of other sizes ({shown})", sizes, drawn, otherwise=number % 2 == 0)
    if drawn:
        yield Inputs("on random inputs of the example's sizes", {}, drawn)


def _dynamic(program: Program) -> dict[_Place, torch.SymInt]:
    """The sizes that can vary."""
    return {
        (index, dim): size
        for index, value in enumerate([node.meta.get("val") for node in program.placeholders()])
        for dim, size in (enumerate(value.shape) if isinstance(value, Tensor) else [(None, value)])
        if is_dynamic(size)
    }


def _holds_one_number(leaf: Tensor) -> bool:
    """Whether a tensor of real numbers is the same everywhere, so that nothing shows where its entries go."""
    return (
        leaf.is_floating_point()
        and leaf.numel() > 1
        and leaf.layout == torch.strided
        and bool((leaf == leaf.reshape(-1)[0]).all())
    )


@dataclass(frozen=True)
class _Symbol:
    """A size that can vary: what it is in the example and may be, the number of those that are as long as it
    along the same dimension, and whether it is that of a batch alone.
    """

    hint: int
    lower: int
    upper: int
    place: int
    is_batch: bool


def _symbols(dynamic: dict[_Place, torch.SymInt]) -> dict[sympy.Symbol, _Symbol]:
    """The symbols of sizes that can vary.

    Inputs that are equally long along the same dimension stay so: a capture need not say that they must (keys
    and values of a cache), and a kernel that is given others can read what is not there.
    """
    symbols: dict[sympy.Symbol, _Symbol] = {}
    places: dict[object, int] = {}
    beyond = {
        symbol for (_, dim), size in dynamic.items() if dim != 0 for symbol in size.node.expr.free_symbols
    }
    for (_, dim), size in dynamic.items():
        environment = size.node.shape_env
        for symbol in sorted(size.node.expr.free_symbols - symbols.keys(), key=str):
            hint, (least, most) = hint_of(symbol, environment), bounds_of(symbol, environment)
            lower = 2 if least is None else max(least, 1)
            upper = 1 << 31 if most is None else most
            if hint is not None and lower < upper:
                key = (dim, hint) if size.node.expr == symbol and dim is not None else symbol
                place = places.setdefault(key, len(places))
                symbols[symbol] = _Symbol(hint, lower, upper, place, symbol not in beyond)
    return symbols


def _assignments(dynamic: dict[_Place, torch.SymInt], grow: bool) -> list[dict[sympy.Symbol, int]]:
    """Values for the symbols of sizes that can vary, as the capture allows; none twice, and never the
    example's own.
    """
    symbols, environments = _symbols(dynamic), {size.node.shape_env for size in dynamic.values()}
    guards = {shapes.replace(one) for shapes in environments for one in conditions_on(shapes)}
    longer = {s: size.hint if size.is_batch else _LONGER + 2 * size.place for s, size in symbols.items()}
    smaller = [
        {
            s: (_BATCHES if size.is_batch else _SMALL)[(size.place + start) % len(_SMALL)]
            for s, size in symbols.items()
        }
        for start in range(len(_SMALL))
    ]
    offered = [] if grow else [longer, *smaller]
    offered += [{s: size.hint + step * (1 + size.place) for s, size in symbols.items()} for step in (1, 2, 3)]
    offered += [{s: size.hint * times for s, size in symbols.items()} for times in (2, 3)]
    seen = [{s: size.hint for s, size in symbols.items()}]
    for wanted in offered:
        assigned = {s: min(max(wanted[s], size.lower), size.upper) for s, size in symbols.items()}
        if assigned not in seen and not any(guard.xreplace(assigned) is sympy.false for guard in guards):
            seen.append(assigned)
    return seen[1:]
