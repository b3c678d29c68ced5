"""What the programs are run on: the example inputs, and inputs of other sizes made of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo

from .._program import Program

#: sizes of a small run, all different so that none can stand for another
_SMALL = (3, 5, 7, 4, 6, 11, 13, 9)


@dataclass(frozen=True)
class Inputs:
    """A recipe for the inputs of one call, which serves the dense program and the pruned one, whose examples may be narrower.

    Attributes:
        said: the inputs in words.
        sizes: new sizes, by position of the input and dimension; ``None`` as dimension: the value of an input that is a size itself.
        drawn: inputs to be filled with random numbers in [0, 1), because the example holds a single number everywhere.
    """

    said: str = "on the example inputs"
    sizes: dict[tuple[int, int | None], int] = field(default_factory=dict)
    drawn: frozenset[int] = frozenset()

    def of(self, program: Program) -> list[Any]:
        """The values of the placeholders of a program; tensors are copies, of which the entries of the example are repeated where a size grew."""
        return [self._made(index, leaf) for index, leaf in enumerate(pytree.tree_leaves(program.example))]

    def _made(self, index: int, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return self.sizes.get((index, None), leaf)
        made = leaf.detach()
        for dim, size in enumerate(leaf.shape):
            wanted = self.sizes.get((index, dim), size)
            if wanted != size:
                at = torch.arange(wanted, device=leaf.device) % max(size, 1)
                made = made.index_select(dim, at) if size else made.new_zeros([*made.shape[:dim], wanted, *made.shape[dim + 1 :]])
        if index in self.drawn:
            return torch.rand(made.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float32).to(made)
        return made.clone() if made.data_ptr() == leaf.data_ptr() else made


def other_inputs(program: Program) -> Iterator[Inputs]:
    """Inputs besides the example, the best ones first; none if no size can vary and no input holds a single number.

    The first are small, so that a second run costs little beside a long example; the next are for programs that do not run on those.
    """
    leaves = pytree.tree_leaves(program.example)
    recorded = [node.meta.get("val") for node in program.placeholders()]
    drawn = frozenset(
        index
        for index, (node, leaf) in enumerate(zip(program.placeholders(), leaves))
        if isinstance(leaf, Tensor) and node.name not in program.state_inputs and _holds_one_number(leaf)
    )
    dynamic: dict[tuple[int, int | None], torch.SymInt] = {}
    for index, value in enumerate(recorded):
        for dim, size in enumerate(value.shape) if isinstance(value, Tensor) else [(None, value)]:
            if isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None:
                dynamic[(index, dim)] = size
    names = [node.name for node in program.placeholders()]
    for assigned in _assignments(dynamic, leaves, grow=program.device().type != "cpu"):
        sizes = {place: int(size.node.expr.xreplace(assigned)) for place, size in dynamic.items()}
        shown = ", ".join(f"{names[index]}{'' if dim is None else f'[{dim}]'} = {size}" for (index, dim), size in sizes.items())
        yield Inputs(f"on inputs of other sizes ({shown})", sizes, drawn)
    if drawn:
        yield Inputs("on random inputs of the example's sizes", {}, drawn)


def _holds_one_number(leaf: Tensor) -> bool:
    """Whether a tensor of real numbers is the same everywhere, so that nothing shows where its entries go."""
    return leaf.is_floating_point() and leaf.numel() > 1 and leaf.layout == torch.strided and bool((leaf == leaf.reshape(-1)[0]).all())


def _assignments(dynamic: dict[tuple[int, int | None], torch.SymInt], leaves: list[Any], grow: bool) -> Iterator[dict[sympy.Symbol, int]]:
    """Values for the symbols of the sizes; ``grow``: larger ones only, where an index out of range cannot be caught."""
    symbols: dict[sympy.Symbol, tuple[int, int, int]] = {}
    for size in dynamic.values():
        environment = size.node.shape_env
        for symbol in sorted(size.node.expr.free_symbols - symbols.keys(), key=str):
            hint = environment.backed_var_to_val.get(symbol)
            bounds = environment.var_to_range.get(symbol)
            lower = int(bounds.lower) if bounds is not None and bounds.lower not in (-int_oo, -sympy.oo) else 2
            upper = int(bounds.upper) if bounds is not None and bounds.upper not in (int_oo, sympy.oo) else 1 << 31
            if hint is not None and lower < upper:
                symbols[symbol] = (int(hint), max(lower, 1), upper)
    if not symbols:
        return
    small: dict[sympy.Symbol, int] = {}
    for symbol, (hint, lower, upper) in symbols.items():
        others = itertools.chain(_SMALL, range(lower, lower + len(symbols) + 2))
        free = [size for size in others if lower <= size <= upper and size != hint]
        small[symbol] = next((size for size in free if size not in small.values()), next(iter(free), hint))
    larger = {symbol: min(hint + 1 + index, upper) for index, (symbol, (hint, _, upper)) in enumerate(symbols.items())}
    smaller = {symbol: max(hint - 1, lower) for symbol, (hint, lower, _) in symbols.items()}
    doubled = {symbol: min(2 * hint, upper) for symbol, (hint, _, upper) in symbols.items()}
    for assigned in [larger, doubled] if grow else [small, larger, smaller, doubled]:
        if any(assigned[symbol] != hint for symbol, (hint, _, _) in symbols.items()):
            yield assigned


__all__ = ["Inputs", "other_inputs"]
