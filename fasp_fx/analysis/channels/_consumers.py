"""Weights that are contracted with an activation: which of their dimensions are columns, rows, blocks and
windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import fx

from fasp_fx.capturing import WHY_NOT_FOLDED

from ._call import Operand, Operands
from ._facts import Layout, Use, Window
from ._numbering import Axis, Numbering


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
        common = self.operands.summed & {*self.activation.letters}
        return [letter for letter in self.weight.letters if letter in common]

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
        if letter not in reading.kept:
            return "row" if letter in reading.inside else "lost"
        return "block" if shared else "row"

    def letters(self, *roles: str) -> list[str]:
        """The letters of the weight that are any of these, role by role."""
        return [letter for role in roles for letter, one in self.roles.items() if one == role]

    def stacked(self) -> list[np.ndarray]:
        """Numbers of the weight's positions at each of which it has a whole matrix, of rows and columns."""
        axes: list[Axis] = []
        for letter in self.letters("block", "row", "column"):
            others = {role for other, role in self.roles.items() if other != letter}
            if {"row", "column"} <= others:
                axes += [axis for axis in self.weight.at(letter) if axis.varying() == [axis.dim]]
        return [axis.numbers.reshape(-1).numpy() for axis in axes]

    def problem(self) -> str | None:
        """Why the weight cannot lose columns here, or ``None`` if it can."""
        weight, named = self.weight, f"'{self.weight.name}' of {self.node.target}"
        if weight.value.origin is None:
            why = weight.node.meta.get(WHY_NOT_FOLDED) if weight.node is not None else None
            return f"{named} is computed from weights, not a weight itself{f'; {why}' if why else ''}"
        if self.letters("lost"):
            return f"{named} is summed over a dimension that the other operand lacks"
        return None

    def alike_in_blocks(self) -> Iterator[tuple[Operand, Axis, str]]:
        """The rows and columns that all blocks of the weight share."""
        weight = self.weight
        for letter in self.letters("block"):
            if letter not in self.operands.reading.routed and weight.size(letter) > 1:
                (dim,) = weight.dims([letter])
                for axis in weight.value.axes:
                    role = self.roles[weight.letters[axis.dim]]
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
    divider, slot = next((other.slot for other in others), None), axis.slot
    if divider is None or slot is None or divider == slot or slot[0] != weight.value.origin:
        return {}
    divided, blocks = numbering.get(*slot), numbering.get(*divider)
    # A letter that is several dimensions merged cannot be told apart as the blocks of one.
    undivided = divided and blocks and {divided.block_dim, blocks.block_dim} == {None}
    whole = blocks and undivided and blocks.size % weight.size(letter) == 0
    return {slot: (blocks.dim, weight.size(letter))} if blocks and whole else {}
