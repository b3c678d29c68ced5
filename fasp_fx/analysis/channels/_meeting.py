"""Couple the axes of several operands that shrink the same letter."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from ._consume import want_blocks
from ._lettered import Lettered
from ._operands import Operand
from ._value import NONE, Axis

#: an operand, one of its axes, and the axis's numbers with one dimension per letter of the node
Found = tuple[Operand, Axis, Tensor]


def couple(relation: Lettered, holders: list[Operand], found: list[Found], order: list[str]) -> list[Tensor]:
    """Couple the axes of different operands, each with the one that divides the positions alike; return one
    of each.
    """
    held = [(holder, [numbers for operand, _, numbers in found if operand is holder]) for holder in holders]
    per_holder = sorted((item for item in held if item[1]), key=lambda item: len(item[1]), reverse=True)
    _want_blocks(relation, found, order)
    leaders = list(per_holder[0][1])
    for holder, axes in per_holder[1:]:
        matches = [0] * len(axes) if len(leaders) == 1 else [_alike(numbers, leaders) for numbers in axes]
        if len(leaders) > 1 and (None in matches or len(set(matches)) < len(matches)):
            for numbers in (*leaders[1:], *axes):
                relation.facts.couple(leaders[0], numbers, relation.node)
            leaders = [reduce(_either, (*leaders, *axes))]
            continue
        for numbers, match in zip(axes, matches, strict=True):
            relation.facts.couple(leaders[int(match or 0)], numbers, relation.node)
            leaders[int(match or 0)] = _either(leaders[int(match or 0)], numbers)
        for index in set(range(len(leaders))) - set(matches):
            # One dimension of several merged ones: this operand has positions there, but no channels to lose
            # them with.
            reason = f"meets '{holder.name}' of {relation.node.target}, which has no channels there"
            relation.facts.say(relation.facts.frozen, leaders[index], reason, relation.node)
    return leaders


def _want_blocks(relation: Lettered, found: list[Found], order: list[str]) -> None:
    """A weight met by channels that differ from block to block had better be numbered block by block."""
    for operand, axis, numbers in found:
        for letter in operand.letters if operand.value.constant and operand.value.origin is not None else ():
            dim = order.index(letter)
            if (
                operand.size(letter) > 1
                and numbers.shape[dim] == 1
                and any(other.shape[dim] > 1 for _, _, other in found)
            ):
                want_blocks(relation.facts, relation.numbering, operand, axis, letter)


def _either(first: Tensor, second: Tensor) -> Tensor:
    """The numbers that vary along more dimensions, and the others' where they have none: what is fixed there,
    consumers of the result share.
    """
    first, second = sorted((first, second), key=_freedom, reverse=True)
    holes = first == NONE
    return (
        torch.where(holes, second.expand(first.shape), first)
        if holes.any() and _fits(second, first)
        else first
    )


def _fits(numbers: Tensor, other: Tensor) -> bool:
    return torch.broadcast_shapes(numbers.shape, other.shape) == other.shape


def _freedom(numbers: Tensor) -> int:
    return sum(size > 1 for size in numbers.shape)


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
