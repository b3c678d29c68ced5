"""Couple the axes of several operands that shrink the same letter, and what an expansion repeats; read
weights that are contracted with an activation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from fasp_fx.capturing import WHY_NOT_FOLDED, arguments
from fasp_fx.patterns import lookup

from ._call import Operand, Operands
from ._facts import Facts, Layout, Use, Window
from ._numbering import NONE, Axis, Numbering, recorded_shape


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
        for letter in operand.letters if operand.value.constant and operand.value.origin is not None else ():
            if letter in varying and numbers.shape[order.index(letter)] == 1 and operand.size(letter) > 1:
                yield operand, axis, letter


def _either(first: Tensor, second: Tensor) -> Tensor:
    """The numbers that vary along more dimensions, and the others' where they have none: what is fixed there,
    consumers of the result share.
    """
    if sum(size > 1 for size in first.shape) < sum(size > 1 for size in second.shape):
        first, second = second, first
    holes = first == NONE
    fits = torch.broadcast_shapes(first.shape, second.shape) == first.shape
    return torch.where(holes, second.expand(first.shape), first) if holes.any() and fits else first


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
    shape = recorded_shape(node)
    return len(shape) < -dim or (isinstance(shape[dim], int) and shape[dim] == 1)


# --- Weights that are contracted with an activation: which of their dimensions are columns, rows, blocks and
# windows.


@dataclass(frozen=True)
class Contraction:
    """A weight and an activation that one call contracts."""

    node: fx.Node
    operands: Operands
    weight: Operand
    activation: Operand

    @property
    def shared(self) -> list[str]:
        """The letters that both have and that are summed over."""
        return [
            one for one in self.weight.letters if one in self.operands.summed & {*self.activation.letters}
        ]

    @cached_property
    def roles(self) -> dict[str, str]:
        """What each letter of the weight is: block, column, window or row; ``none`` where it has one
        position, ``lost`` where it is summed.
        """
        return {letter: self._role(letter) for letter in self.weight.letters}

    def _role(self, letter: str) -> str:
        reading, shared = self.operands.reading, letter in self.activation.letters
        if letter in reading.sliding:
            return "window"
        if letter in reading.routed:
            return "block"
        if shared and letter not in reading.kept:
            return "column"
        if self.weight.size(letter) == 1:
            return "none"
        is_lost = letter not in reading.kept and letter not in reading.inside
        return "lost" if is_lost else "block" if shared and letter in reading.kept else "row"

    def letters(self, *roles: str) -> list[str]:
        """The letters of the weight that are any of these, role by role."""
        return [letter for role in roles for letter, one in self.roles.items() if one == role]

    def stacked(self) -> list[np.ndarray]:
        """Numbers of the weight's positions at each of which it has a whole matrix, of rows and columns."""
        letters = [
            letter
            for letter in self.letters("block", "row", "column")
            if {"row", "column"} <= {role for other, role in self.roles.items() if other != letter}
        ]
        axes = (axis for letter in letters for axis in self.weight.at(letter) if axis.varying() == [axis.dim])
        return [axis.numbers.reshape(-1).numpy() for axis in axes]

    def problem(self) -> str | None:
        """Why the weight cannot lose columns here, or ``None`` if it can."""
        weight, named = self.weight, f"'{self.weight.name}' of {self.node.target}"
        if weight.value.origin is None:
            why = weight.node.meta.get(WHY_NOT_FOLDED) if weight.node is not None else None
            return f"{named} is computed from weights, not a weight itself{f'; {why}' if why else ''}"
        lost = f"{named} is summed over a dimension that the other operand lacks"
        return lost if self.letters("lost") else None

    def alike_in_blocks(self) -> Iterator[tuple[Operand, Axis, str]]:
        """The rows and columns that all blocks of the weight share."""
        weight = self.weight
        routed = self.operands.reading.routed
        blocks = [one for one in self.letters("block") if one not in routed and weight.size(one) > 1]
        for letter, axis in itertools.product(blocks, weight.value.axes):
            role, (dim,) = self.roles[weight.letters[axis.dim]], weight.dims([letter])
            if role in ("column", "row") and axis.numbers.shape[dim] == 1:
                yield weight, axis, letter

    def axes(self) -> list[Axis]:
        """The axes along letters that no other operand has."""
        alone = [letter for letter in self.shared if len(self.operands.holders(letter)) == 2]
        return [axis for one in (self.weight, self.activation) for letter in alone for axis in one.at(letter)]

    def uses(self) -> list[Use]:
        """The use of the weight, if it has columns."""
        weight, activation, reading = self.weight, self.activation, self.operands.reading
        blocks, columns, windows = (self.letters(role) for role in ("block", "column", "window"))
        axes = [axis for letter in columns for axis in weight.at(letter)]
        if not axes:
            return []
        assert weight.node is not None
        assert activation.node is not None
        assert weight.value.origin is not None
        others = [operand for operand in self.operands.each if operand is not weight]
        route = next((other.node for other in others if reading.routed & {*other.letters}), None)
        along = [*blocks, *columns, *windows]
        single = weight.at(blocks[0]) if len(blocks) == 1 else []
        alone = len(single) == 1 and len(single[0].varying()) == 1
        use = Use(
            self.node,
            weight.value.origin,
            weight.node,
            activation.node,
            np.stack([_columns(axis, weight, along, len(blocks)) for axis in axes], axis=-1),
            frozenset(axis.slot for axis in axes if axis.slot is not None),
            Layout(weight.splits, weight.dims(blocks), weight.dims([*columns, *windows])),
            Layout(
                activation.splits,
                () if route is not None else activation.dims(blocks),
                activation.dims(columns),
                tuple(self._window(letter) for letter in windows),
            ),
            route,
            single[0].numbers.reshape(-1).numpy() if alone else None,
            self.operands.recurrences.get(activation.name),
        )
        return [use]

    def _window(self, letter: str) -> Window:
        reading = self.operands.reading
        slides = enumerate(clause.words for clause in reading.rule.all("slide"))
        place, (over, _, *names) = next(item for item in slides if item[1][1] == letter)
        stride, padding, dilation = (
            each[min(place, len(each) - 1)] if isinstance(each, (list, tuple)) else each
            for each in (reading.arguments[name] for name in names)
        )
        (dim,), size = self.activation.dims([over]), self.weight.size(letter)
        total = dilation * (size - 1) if padding == "same" else 0 if padding == "valid" else 2 * int(padding)
        return Window(dim, size, int(stride), (total // 2, total - total // 2), int(dilation))


def _columns(axis: Axis, weight: Operand, letters: list[str], blocks: int) -> np.ndarray:
    """The numbers of one axis as ``[blocks, columns]``; along rows they are coupled, so that the first row
    speaks for all.
    """
    numbers = axis.numbers
    for dim, letter in enumerate(weight.letters):
        if letter not in letters:
            numbers = numbers.narrow(dim, 0, 1)
    sizes, dims = [weight.size(letter) for letter in letters], weight.dims(letters)
    laid = numbers.permute([*dims, *(dim for dim in range(numbers.dim()) if dim not in dims)])
    laid = laid.reshape([numbers.shape[dim] for dim in dims])
    return laid.expand(sizes).reshape(int(np.prod(sizes[:blocks], dtype=int)), -1).numpy()


def blocks_wanted(
    numbering: Numbering, weight: Operand, axis: Axis, letter: str
) -> dict[tuple[str, int], tuple[int, int]]:
    """The dimension of the weight which ``axis`` numbers, if it can be numbered apart for every position of
    ``letter``; with the dimension that these divide, and how many they are.
    """
    (dim,) = weight.dims([letter])
    others = (other for other in weight.value.axes if other is not axis and other.numbers.shape[dim] > 1)
    other, slot, count = next(others, None), axis.slot, weight.size(letter)
    if other is None or other.slot is None or slot is None or slot[0] != weight.value.origin:
        return {}
    divided, blocks = numbering.get(*slot), numbering.get(*other.slot)
    if divided is None or blocks is None or {divided.block_dim, blocks.block_dim} != {None}:
        return {}
    # A letter that is several dimensions merged cannot be told apart as the blocks of one; nor one whose
    # positions lie in turn with those of another.
    places = (other.numbers.movedim(dim, 0).reshape(count, -1) - blocks.base) * count // blocks.size
    whole = divided is not blocks and blocks.size % count == 0
    return {slot: (blocks.dim, count)} if whole and bool((torch.arange(count) == places.T).all()) else {}
