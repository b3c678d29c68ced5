"""What the programs are run on: the example inputs, and inputs of other sizes made of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

from ...base.compat import int_oo, pytree
from ...capturing._program import Program
from ...capturing._sizes import is_dynamic

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


__all__ = ["Inputs", "inputs_for"]
