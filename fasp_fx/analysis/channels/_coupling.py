"""Couple the axes of several operands that shrink the same letter, and what an expansion repeats."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, fx

from fasp_fx.capturing import arguments
from fasp_fx.patterns import lookup

from ._call import Operand
from ._facts import Facts
from ._numbering import NONE, Axis


class Meeting(NamedTuple):
    """An axis that shrinks a letter: the operand that has it, and its numbers with one dimension per letter
    of the call.
    """

    operand: Operand
    axis: Axis
    numbers: Tensor


def couple(holders: list[Operand], meeting: list[Meeting], facts: Facts, node: fx.Node) -> list[Tensor]:
    """Couple the axes of different operands, each with the one that divides the positions alike; return one
    of each.
    """
    numbers = [[each.numbers for each in meeting if each.operand is holder] for holder in holders]
    several = [(holder, axes) for holder, axes in zip(holders, numbers, strict=True) if axes]
    several.sort(key=lambda item: len(item[1]), reverse=True)
    leaders = list(several[0][1])
    for holder, axes in several[1:]:
        matches = [0] * len(axes) if len(leaders) == 1 else [_alike(each, leaders) for each in axes]
        if len(leaders) > 1 and (None in matches or len(set(matches)) < len(matches)):
            for each in (*leaders[1:], *axes):
                facts.couple(leaders[0], each, node)
            leaders = [reduce(_either, (*leaders, *axes))]
            continue
        for each, match in zip(axes, matches, strict=True):
            facts.couple(leaders[int(match or 0)], each, node)
            leaders[int(match or 0)] = _either(leaders[int(match or 0)], each)
        for index in set(range(len(leaders))) - set(matches):
            # One dimension of several merged ones: this operand has positions there, but no channels to lose
            # them with.
            reason = f"meets '{holder.name}' of {node.target}, which has no channels there"
            facts.say(facts.remarks.frozen, leaders[index], reason, node)
    return leaders


def alike_in_blocks(meeting: list[Meeting], order: list[str]) -> Iterator[tuple[Operand, Axis, str]]:
    """The weights that have the same channels at all positions of a letter, along which what they meet has
    others.
    """
    varying = {letter for each in meeting for letter, size in zip(order, each.numbers.shape) if size > 1}
    for operand, axis, numbers in meeting:
        is_weight = operand.value.constant and operand.value.origin is not None
        for letter in operand.letters if is_weight else ():
            if letter in varying and numbers.shape[order.index(letter)] == 1 and operand.size(letter) > 1:
                yield operand, axis, letter


def _either(first: Tensor, second: Tensor) -> Tensor:
    """The numbers that vary along more dimensions, and the others' where they have none: what is fixed there,
    consumers of the result share.
    """
    if sum(size > 1 for size in first.shape) < sum(size > 1 for size in second.shape):
        first, second = second, first
    holes = first == NONE
    return (
        torch.where(holes, second.expand(first.shape), first)
        if holes.any() and _fits(second, first)
        else first
    )


def _fits(numbers: Tensor, other: Tensor) -> bool:
    return torch.broadcast_shapes(numbers.shape, other.shape) == other.shape


def _alike(numbers: Tensor, leaders: list[Tensor]) -> int | None:
    """The leader that puts the same positions together as ``numbers`` does."""
    for index, leader in enumerate(leaders):
        shape = torch.broadcast_shapes(numbers.shape, leader.shape)
        parts = [
            torch.unique(part.expand(shape), return_inverse=True)[1].reshape(-1) for part in (numbers, leader)
        ]
        together = torch.unique(torch.stack(parts), dim=1).shape[1]
        if together == int(parts[0].max()) + 1 == int(parts[1].max()) + 1:
            return index
    return None


# --- Where an expansion repeats what a weight's channels meet: what is repeated can be repeated less often.


#: operators that repeat a dimension of one, and the argument that says how often
_REPEATS = {torch.ops.aten.expand.default: "size", torch.ops.aten.repeat.default: "repeats"}


def stretched(operand: Operand, letter: str) -> Iterator[tuple[str, int]]:
    """The expansions, each with its dimension, that give an operand its size along a letter: itself, or those
    that it is computed from, element by element.
    """
    # From the end, so that the dimension is the same in whatever is broadcast.
    dim = operand.letters.index(letter) - len(operand.letters)
    reached = [] if operand.node is None or operand.splits else [operand.node]
    seen = set[fx.Node]()
    while reached:
        node = reached.pop()
        if node.target in _REPEATS:
            sizes = arguments(node)[_REPEATS[node.target]]
            if isinstance(sizes[dim], int) and sizes[dim] > 1 and _is_one(node.all_input_nodes[0], dim):
                yield node.name, len(sizes) + dim
        elif node not in seen and (rule := lookup(node.target)) is not None and rule.pointwise:
            reached += [source for source in node.all_input_nodes if not _is_one(source, dim)]
        seen.add(node)


def _is_one(node: fx.Node, dim: int) -> bool:
    """Whether a dimension from the end has one position, or is not there. Sizes that vary are not asked: it
    would settle them.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() < -dim:
        return True
    size = value.shape[dim]
    return isinstance(size, int) and size == 1
