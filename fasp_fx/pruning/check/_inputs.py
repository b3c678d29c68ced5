"""What the programs are run on: the example inputs, and inputs of other sizes made of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ...base.compat import int_oo, pytree
from ...capturing._program import Program
from ...capturing._sizes import is_dynamic

#: sizes of a small run, all different so that none can stand for another; multiples of the usual divisors
#: among them
_SMALL = (3, 5, 7, 4, 6, 8, 9, 12, 16)
#: how many other inputs are offered at most
_OFFERED = 4
#: elements from which on an example is long
_LONG = 1 << 10
#: positions behind which short examples are looked at as well
_SHORT = 16


@dataclass(frozen=True)
class Inputs:
    """A recipe for the inputs of one call, which serves the dense program and the pruned one, whose examples
    may be narrower.

    Attributes:
        said: the inputs in words.
        sizes: new sizes, by position of the input and dimension; ``None`` as dimension: the value of an input
            that is a size itself.
        drawn: inputs to be filled with random numbers in [0, 1), because the example holds a single number
            everywhere.
        long: whether a run takes long and a shorter one follows, in which small deviations can be looked
            into.
    """

    said: str = "on the example inputs"
    sizes: dict[tuple[int, int | None], int] = field(default_factory=dict)
    drawn: frozenset[int] = frozenset()
    long: bool = False

    def of(self, program: Program) -> list[Any]:
        """The values of the placeholders of a program; tensors are copies, of which the entries of the
        example are repeated where a size grew.
        """
        return [self._made(index, leaf) for index, leaf in enumerate(_leaves(program))]

    def _made(self, index: int, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return self.sizes.get((index, None), leaf)
        made = leaf.detach()
        for dim, size in enumerate(leaf.shape):
            wanted = self.sizes.get((index, dim), size)
            if wanted != size:
                at = torch.arange(wanted, device=leaf.device) % max(size, 1)
                made = (
                    made.index_select(dim, at)
                    if size
                    else made.new_zeros([*made.shape[:dim], wanted, *made.shape[dim + 1 :]])
                )
        if index in self.drawn:
            generator = torch.Generator(device="cpu").manual_seed(index)
            return torch.rand(made.shape, generator=generator, dtype=torch.float32, device="cpu").to(made)
        return _laid_like(leaf, made)


def _laid_like(leaf: Tensor, made: Tensor) -> Tensor:
    """A copy that is part of a larger tensor where the example is: a capture can ask for that."""
    if leaf.layout != torch.strided or not leaf.dim() or leaf.is_contiguous():
        return made.clone()
    if made.shape == leaf.shape and all(leaf.stride()):
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device).copy_(
            made
        )
    return made.new_empty([*made.shape[:-1], made.shape[-1] + 1])[..., :-1].copy_(made)


def example_inputs(program: Program) -> Iterator[Inputs]:
    """The example: one of its two samples where a capture has doubled a single one, and the whole."""
    leaves = _leaves(program)
    long = bool(_dynamic(program)) and _is_long(leaves)
    if long and program.doubled:
        single: dict[tuple[int, int | None], int] = {
            (index, 0): 1 for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)
        }
        yield Inputs(sizes=single, long=True)
    yield Inputs(long=long)


def other_inputs(program: Program) -> Iterator[Inputs]:
    """Inputs besides the example, the best ones first; none if no size can vary and no input holds a single
    number.

    The first are small, so that a second run costs little beside a long example; the next are for programs
    that do not run on those.
    """
    leaves, dynamic, nodes = _leaves(program), _dynamic(program), program.placeholders()
    drawn = frozenset(
        index
        for index, (node, leaf) in enumerate(zip(nodes, leaves))
        if isinstance(leaf, Tensor) and node.name not in program.state_inputs and _holds_one_number(leaf)
    )
    for assigned in _assignments(_Symbols.of(dynamic), grow=program.device().type != "cpu"):
        yield _of_sizes(nodes, dynamic, assigned, drawn)
    if drawn:
        yield Inputs("on random inputs of the example's sizes", {}, drawn)


def later_inputs(program: Program) -> Iterator[Inputs]:
    """Inputs longer than a short example, of which some things happen only behind the first positions; none
    beside a long one, and none where an index out of range cannot be caught.
    """
    if program.device().type == "cpu" and not _is_long(_leaves(program)):
        yield from longer_inputs(program, _SHORT)


def longer_inputs(program: Program, length: int) -> Iterator[Inputs]:
    """Inputs that are longer than ``length`` along all but their first dimensions, if sizes there can vary
    and the capture allows it.
    """
    dynamic = _dynamic(program)
    symbols = _Symbols.of(dynamic)
    place = symbols.places()
    wanted = {
        symbol: hint if symbol in symbols.first else length + 1 + 2 * place[symbol]
        for symbol, (hint, _, _) in symbols.ranges.items()
    }
    assigned = symbols.within(wanted)
    if any(assigned[symbol] > length for symbol in assigned.keys() - symbols.first) and symbols.allow(
        assigned
    ):
        yield _of_sizes(program.placeholders(), dynamic, assigned, frozenset())


def _of_sizes(
    nodes: list[fx.Node],
    dynamic: dict[tuple[int, int | None], torch.SymInt],
    assigned: dict[sympy.Symbol, int],
    drawn: frozenset[int],
) -> Inputs:
    sizes = {place: int(size.node.expr.xreplace(assigned)) for place, size in dynamic.items()}
    shown = ", ".join(
        f"{nodes[index].name}{'' if dim is None else f'[{dim}]'} = {size}"
        for (index, dim), size in sizes.items()
    )
    return Inputs(f"on inputs of other sizes ({shown})", sizes, drawn)


def _is_long(leaves: list[Any]) -> bool:
    """Whether a run on an example takes long."""
    return sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor)) > _LONG


def _leaves(program: Program) -> list[Any]:
    return pytree.tree_leaves(program.example)


def _dynamic(program: Program) -> dict[tuple[int, int | None], torch.SymInt]:
    """The sizes that can vary, by position of the input and dimension."""
    found: dict[tuple[int, int | None], torch.SymInt] = {}
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


@dataclass(frozen=True)
class _Symbols:
    """The symbols of the sizes that can vary.

    Inputs that are equally long along the same dimension stay so: a capture need not say that they must (keys
    and values of a cache), and a kernel that is given others can read what is not there.

    Attributes:
        ranges: of each its value in the example, and the bounds.
        leaders: for each symbol, the one whose value it takes.
        first: those that are sizes along first dimensions alone.
        guards: what must hold.
    """

    ranges: dict[sympy.Symbol, tuple[int, int, int]]
    leaders: dict[sympy.Symbol, sympy.Symbol]
    first: set[sympy.Symbol]
    guards: set[Any]

    @staticmethod
    def of(dynamic: dict[tuple[int, int | None], torch.SymInt]) -> _Symbols:
        made, beyond = _Symbols({}, {}, set(), set()), set[sympy.Symbol]()
        alike: dict[tuple[int | None, int], sympy.Symbol] = {}
        for (_, dim), size in dynamic.items():
            environment = size.node.shape_env
            made.guards.update(environment.replace(guard.expr) for guard in environment.guards)
            (made.first if dim == 0 else beyond).update(size.node.expr.free_symbols)
            for symbol in sorted(size.node.expr.free_symbols - made.ranges.keys(), key=str):
                hint, bounds = environment.backed_var_to_val.get(symbol), environment.var_to_range.get(symbol)
                lower = (
                    int(bounds.lower)
                    if bounds is not None and bounds.lower not in (-int_oo, -sympy.oo)
                    else 2
                )
                upper = (
                    int(bounds.upper)
                    if bounds is not None and bounds.upper not in (int_oo, sympy.oo)
                    else 1 << 31
                )
                if hint is not None and lower < upper:
                    made.ranges[symbol] = (int(hint), max(lower, 1), upper)
                    made.leaders[symbol] = (
                        alike.setdefault((dim, int(hint)), symbol)
                        if size.node.expr == symbol and dim is not None
                        else symbol
                    )
        made.first.difference_update(beyond)
        return made

    def places(self) -> dict[sympy.Symbol, int]:
        """A number for each symbol, the same for those that take one value."""
        number = {leader: index for index, leader in enumerate(dict.fromkeys(self.leaders.values()))}
        return {symbol: number[leader] for symbol, leader in self.leaders.items()}

    def within(self, wanted: dict[sympy.Symbol, int]) -> dict[sympy.Symbol, int]:
        """Values brought within their bounds."""
        return {
            symbol: min(max(size, self.ranges[symbol][1]), self.ranges[symbol][2])
            for symbol, size in wanted.items()
        }

    def allow(self, assigned: dict[sympy.Symbol, int]) -> bool:
        """Whether no guard is known to fail."""
        return not any(guard.xreplace(assigned) is sympy.false for guard in self.guards)


def _assignments(symbols: _Symbols, grow: bool) -> Iterator[dict[sympy.Symbol, int]]:
    """Values for the symbols of the sizes, as the capture allows; ``grow``: larger ones only, where an index
    out of range cannot be caught.
    """
    yield from itertools.islice(filter(symbols.allow, _candidates(symbols, grow)), _OFFERED)


def _candidates(symbols: _Symbols, grow: bool) -> Iterator[dict[sympy.Symbol, int]]:
    """Values within the bounds; small ones first, none twice, and never the example's own."""
    hints, place = {symbol: hint for symbol, (hint, _, _) in symbols.ranges.items()}, symbols.places()
    grown = [
        {symbol: hint + step * (1 + place[symbol]) for symbol, hint in hints.items()} for step in (1, 2, 3)
    ]
    grown += [{symbol: times * hint for symbol, hint in hints.items()} for times in (2, 3)]
    small = [
        {symbol: _SMALL[(place[symbol] + start) % len(_SMALL)] for symbol in hints}
        for start in range(len(_SMALL))
    ]
    seen = [hints]
    for wanted in grown if grow else [*small, *grown]:
        assigned = symbols.within(wanted)
        if assigned not in seen:
            seen.append(assigned)
            yield assigned


__all__ = ["Inputs", "example_inputs", "later_inputs", "longer_inputs", "other_inputs"]
