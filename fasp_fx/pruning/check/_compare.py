"""Whether two programs compute the same: in their own precision, and in a higher one where that leaves a
doubt.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ...base._tolerable import tolerable
from ...base.compare import deviation, tolerance
from ...base.compat import int_oo, pytree
from ...capturing._compare_with_model import coarsest
from ...capturing._program import Program
from ...capturing._sizes import is_dynamic
from ._run import Ran, remembers, run


@dataclass(frozen=True)
class Seen:
    """What one comparison came to.

    Attributes:
        deviation: max|a − b| / max|b| of the worst output, infinite where integers, shapes or the places of
            NaN and infinities differ.
        equal: whether the two compute the same but for rounding.
        compared: whether they could be compared.
        call: which of the calls in a row differs most, from 0.
        rounded: whether an operator that has no higher precision rounded on the way to it.
        alone: whether a doubt is left that no higher precision could settle, since nothing runs in one.
    """

    deviation: float
    equal: bool
    compared: bool = True
    call: int = 0
    rounded: bool = False
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
    return compare_with_escalation(
        lambda dtype: _compare(reference, module, pruned, inputs, dtype), coarsest(reference)
    )


def takes(program: Program, inputs: Inputs) -> bool:
    """Whether a program runs on some inputs."""
    try:
        run(program.module, inputs.of(program), 1, None)
    except tolerable(Exception):  # a program raises what it likes
        return False
    return True


def compare_with_escalation(look: Callable[[torch.dtype | None], Seen], coarse: torch.dtype) -> Seen:
    """Compare two computations in their own precision, and in a higher one where that leaves a doubt, as
    types of 16 bits always do. Where none can be had, what passes is the little that would have left none.

    Args:
        look: compares them in a precision, ``None`` being their own.
        coarse: the coarsest type in them.
    """
    is_half = torch.finfo(coarse).eps > torch.finfo(torch.float32).eps
    seen = look(None)
    seen = replace(seen, equal=seen.deviation <= tolerance("sums in another order", coarse))
    if not seen.compared or (seen.equal and not is_half):
        return seen
    last = coarse
    for dtype in (torch.float32, torch.float64) if is_half else (torch.float64,):
        try:
            found = look(dtype)
        except tolerable(Exception):  # there is no such precision here, or not for what is computed
            return replace(seen, equal=seen.deviation <= tolerance("no higher precision", last), alone=True)
        last, allowed = dtype, tolerance("sums in another order", dtype)
        if found.rounded and dtype is torch.float64:
            allowed = tolerance("one rounded operator", coarse)
        seen = replace(found, equal=found.deviation <= allowed)
        if seen.equal:
            break
    return seen


def _compare(
    reference: Program, module: fx.GraphModule, pruned: Program, inputs: Inputs, precision: torch.dtype | None
) -> Seen:
    calls = 2 if remembers(reference.module) or remembers(module) else 1
    try:
        expected = run(reference.module, inputs.of(reference), calls, precision)
    except tolerable(Exception) as error:  # a program raises what it likes
        raise ReferenceFailedError(str(error)) from error
    found = run(module, inputs.of(pruned), calls, precision)
    if found.drawn != expected.drawn:
        return Seen(0.0, True, compared=False)
    worst, call = max(_deviations(found, expected, reference.state_outputs), default=(0.0, 0))
    return Seen(worst, True, call=-call, rounded=expected.rounded or found.rounded)


def _deviations(found: Ran, expected: Ran, state: frozenset[int]) -> Iterable[tuple[float, int]]:
    """The deviation of every output, and the call that it is of, from 0 down; outputs that hold state may be
    narrower, and are not compared then.
    """
    for call, (ours, theirs) in enumerate(zip(found.outputs, expected.outputs, strict=True)):
        if len(ours) != len(theirs):
            yield math.inf, -call
            return
        for index, (a, b) in enumerate(zip(ours, theirs)):
            narrower = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape
            if not (index in state and narrower):
                yield deviation(a, b), -call


#: sizes of a small run, all different so that none can stand for another; multiples of the usual divisors
#: among them
_SMALL = (3, 5, 7, 4, 6, 8, 9, 12, 16)
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
        said: the inputs in words.
        sizes: those that are not the example's.
        drawn: inputs to be filled with random numbers in [0, 1), because the example holds a single number
            everywhere.
    """

    said: str = "on the example inputs"
    sizes: dict[_Place, int] = field(default_factory=dict)
    drawn: frozenset[int] = frozenset()

    def of(self, program: Program) -> list[Any]:
        """The values of the placeholders of a program; tensors are copies, of which the entries of the
        example are repeated where a size grew.
        """
        return [self._made(index, leaf) for index, leaf in enumerate(pytree.tree_leaves(program.example))]

    def _made(self, index: int, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return self.sizes.get((index, None), leaf)
        made = leaf.detach()
        for dim, size in enumerate(leaf.shape):
            wanted = self.sizes.get((index, dim), size)
            if wanted != size and size:
                made = made.index_select(dim, torch.arange(wanted, device=leaf.device) % size)
            elif wanted != size:
                made = made.new_zeros([*made.shape[:dim], wanted, *made.shape[dim + 1 :]])
        if index in self.drawn:
            generator = torch.Generator(device="cpu").manual_seed(index)
            return torch.rand(made.shape, generator=generator, dtype=torch.float32, device="cpu").to(made)
        return _laid_like(leaf, made)


def _laid_like(leaf: Tensor, made: Tensor) -> Tensor:
    """A copy that is part of a larger tensor where the example is: a capture can ask for that."""
    if leaf.layout != torch.strided or not leaf.dim() or leaf.is_contiguous():
        return made.clone()
    if made.shape == leaf.shape and all(leaf.stride()):
        return made.new_empty_strided(leaf.shape, leaf.stride()).copy_(made)
    return made.new_empty([*made.shape[:-1], made.shape[-1] + 1])[..., :-1].copy_(made)


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
    assignments = _assignments(dynamic, grow=program.device().type != "cpu")
    for assigned in itertools.islice(assignments, _OFFERED):
        sizes = {place: int(size.node.expr.xreplace(assigned)) for place, size in dynamic.items()}
        shown = ", ".join(
            f"{nodes[index].name}{'' if dim is None else f'[{dim}]'} = {size}"
            for (index, dim), size in sizes.items()
        )
        yield Inputs(f"on inputs of other sizes ({shown})", sizes, drawn)
    if drawn:
        yield Inputs("on random inputs of the example's sizes", {}, drawn)


def _dynamic(program: Program) -> dict[_Place, torch.SymInt]:
    """The sizes that can vary."""
    found: dict[_Place, torch.SymInt] = {}
    for index, node in enumerate(program.placeholders()):
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape) if isinstance(value, Tensor) else [(None, value)]:
            if is_dynamic(size):
                found[(index, dim)] = size
    return found


def _holds_one_number(leaf: Tensor) -> bool:
    """Whether a tensor of real numbers is the same everywhere, so that nothing shows where its entries go."""
    return (
        leaf.is_floating_point()
        and leaf.numel() > 1
        and leaf.layout == torch.strided
        and bool((leaf == leaf.reshape(-1)[0]).all())
    )


def _assignments(dynamic: dict[_Place, torch.SymInt], grow: bool) -> Iterator[dict[sympy.Symbol, int]]:
    """Values for the symbols of sizes that can vary, as the capture allows; none twice, and never the
    example's own.

    Inputs that are equally long along the same dimension stay so: a capture need not say that they must (keys
    and values of a cache), and a kernel that is given others can read what is not there.
    """
    hints: dict[sympy.Symbol, int] = {}
    bounds: dict[sympy.Symbol, tuple[int, int]] = {}
    number: dict[object, int] = {}  # of each size that is one's own
    place: dict[sympy.Symbol, int] = {}
    guards, beyond = set[Any](), set[sympy.Symbol]()
    for (_, dim), size in dynamic.items():
        environment = size.node.shape_env
        guards.update(environment.replace(guard.expr) for guard in environment.guards)
        beyond |= size.node.expr.free_symbols if dim != 0 else set()
        for symbol in sorted(size.node.expr.free_symbols - hints.keys(), key=str):
            hint, known = environment.backed_var_to_val.get(symbol), environment.var_to_range.get(symbol)
            if hint is None:
                continue
            lower, upper = (2, int_oo) if known is None else (known.lower, known.upper)
            lower = 2 if lower in (-int_oo, -sympy.oo) else max(int(lower), 1)
            upper = 1 << 31 if upper in (int_oo, sympy.oo) else int(upper)
            if lower < upper:
                hints[symbol], bounds[symbol] = int(hint), (lower, upper)
                own = (dim, int(hint)) if size.node.expr == symbol and dim is not None else symbol
                place[symbol] = number.setdefault(own, len(number))
    longer = {
        symbol: _LONGER + 2 * place[symbol] if symbol in beyond else hint for symbol, hint in hints.items()
    }
    small = [
        {symbol: _SMALL[(place[symbol] + start) % len(_SMALL)] for symbol in hints}
        for start in range(len(_SMALL))
    ]
    grown = [
        {symbol: hint + step * (1 + place[symbol]) for symbol, hint in hints.items()} for step in (1, 2, 3)
    ]
    grown += [{symbol: times * hint for symbol, hint in hints.items()} for times in (2, 3)]
    seen = [hints]
    for wanted in grown if grow else [longer, *small, *grown]:
        assigned = {
            symbol: min(max(size, bounds[symbol][0]), bounds[symbol][1]) for symbol, size in wanted.items()
        }
        if assigned not in seen and not any(guard.xreplace(assigned) is sympy.false for guard in guards):
            seen.append(assigned)
            yield assigned


__all__ = [
    "Inputs",
    "ReferenceFailedError",
    "Seen",
    "compare",
    "compare_with_escalation",
    "inputs_for",
    "takes",
]
