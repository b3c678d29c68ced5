"""Couple the axes of several operands that shrink the same letter."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import numpy as np
import torch
from torch import Tensor, fx

from fasp_fx.capturing import WHY_NOT_FOLDED, arguments
from fasp_fx.patterns import lookup

from ._facts import Facts, Layout, Use, Window
from ._lettered import Lettered, Operand, Slide
from ._numbering import NONE, Axis, Numbering

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
    first, second = sorted((first, second), key=lambda own: sum(size > 1 for size in own.shape), reverse=True)
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
    reached, seen = [] if operand.node is None or operand.splits else [operand.node], set[fx.Node]()
    while reached:
        node = reached.pop()
        if node.target in _REPEATS:
            sizes = arguments(node)[_REPEATS[node.target]]
            if isinstance(sizes[dim], int) and sizes[dim] > 1 and _is_one(node.all_input_nodes[0], dim):
                yield node.name, len(sizes) + dim
        elif node not in seen and (rule := lookup(node.target)) is not None and rule.pointwise:
            reached += [given for given in node.all_input_nodes if not _is_one(given, dim)]
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


def _padding(slide: Slide, size: int) -> tuple[int, int]:
    if slide.padding == "valid":
        return 0, 0
    if slide.padding == "same":
        total = slide.dilation * (size - 1)
        return total // 2, total - total // 2
    return int(slide.padding), int(slide.padding)


def consume(relation: Lettered, weight: Operand, activation: Operand) -> str | None:
    """Record a weight that is contracted with an activation as a consumer.

    Returns:
        Why it cannot lose columns here, or ``None`` if it can.
    """
    roles = _roles(relation, weight, activation)
    for letter in weight.letters:
        others = {role for other, role in roles.items() if other != letter}
        if {"row", "column"} <= others and roles[letter] in ("block", "row", "column"):
            # At each position a whole matrix, of rows and columns.
            relation.facts.stacked += [
                axis.numbers.reshape(-1).numpy() for axis in weight.at(letter) if axis.varying() == [axis.dim]
            ]
    problem = _why_no_consumer(relation, weight, roles)
    if problem is None:
        _part_blocks(relation, weight, roles)
        if any(weight.at(letter) for letter, role in roles.items() if role == "column"):
            relation.facts.uses.append(_use(relation, weight, activation, roles))
    return problem


def _roles(relation: Lettered, weight: Operand, activation: Operand) -> dict[str, str]:
    """What each letter of the weight is: block, column, window or row; ``none`` where it has one position,
    ``lost`` where it is summed.
    """
    within = {slide.within for slide in relation.slides}
    roles = {}
    for letter in weight.letters:
        if letter in within:
            roles[letter] = "window"
        elif letter in relation.routes:
            roles[letter] = "block"
        elif letter in activation.letters and letter not in relation.kept:
            roles[letter] = "column"
        elif weight.size(letter) == 1:
            roles[letter] = "none"
        elif letter not in relation.kept:
            roles[letter] = "row" if letter in relation.inside else "lost"
        else:
            roles[letter] = "block" if letter in activation.letters else "row"
    return roles


def _why_no_consumer(relation: Lettered, weight: Operand, roles: dict[str, str]) -> str | None:
    target = relation.node.target
    if weight.value.origin is None:
        why = weight.node.meta.get(WHY_NOT_FOLDED) if weight.node is not None else None
        return (
            f"'{weight.name}' of {target} is computed from weights, not a weight"
            f" itself{f'; {why}' if why else ''}"
        )
    if "lost" in roles.values():
        return f"'{weight.name}' of {target} is summed over a dimension that the other operand lacks"
    return None


def _part_blocks(relation: Lettered, weight: Operand, roles: dict[str, str]) -> None:
    """Ask for numbers of their own for the rows and columns of every block of a weight, where blocks would
    share them.
    """
    for letter, role in roles.items():
        if role == "block" and letter not in relation.routes and weight.size(letter) > 1:
            for axis in weight.value.axes:
                if (
                    roles[weight.letters[axis.dim]] in ("column", "row")
                    and axis.numbers.shape[weight.letters.index(letter)] == 1
                ):
                    want_blocks(relation.facts, relation.numbering, weight, axis, letter)


def _use(relation: Lettered, weight: Operand, activation: Operand, roles: dict[str, str]) -> Use:
    assert weight.node is not None
    assert activation.node is not None
    assert weight.value.origin is not None
    blocks, columns, windows = (
        [letter for letter, own in roles.items() if own == role] for role in ("block", "column", "window")
    )
    by_letter = {slide.within: slide for slide in relation.slides}
    others = (operand for operand in relation.operands if operand is not weight)
    route = next((other.node for other in others if relation.routes & {*other.letters}), None)
    sliding = tuple(
        Window(
            activation.letters.index(by_letter[letter].over),
            weight.size(letter),
            by_letter[letter].stride,
            _padding(by_letter[letter], weight.size(letter)),
            by_letter[letter].dilation,
        )
        for letter in windows
    )
    axes = [axis for letter in columns for axis in weight.at(letter)]
    along = [*blocks, *columns, *windows]
    numbers = np.stack([_columns(axis, weight, along, len(blocks)) for axis in axes], axis=-1)
    single = weight.at(blocks[0]) if len(blocks) == 1 else []
    alone = len(single) == 1 and len(single[0].varying()) == 1
    return Use(
        relation.node,
        weight.value.origin,
        weight.node,
        activation.node,
        numbers,
        frozenset(axis.slot for axis in axes if axis.slot is not None),
        Layout(weight.splits, _at(weight, blocks), _at(weight, [*columns, *windows])),
        Layout(
            activation.splits,
            () if route is not None else _at(activation, blocks),
            _at(activation, columns),
            sliding,
        ),
        route,
        single[0].numbers.reshape(-1).numpy() if alone else None,
        relation.recurrences.get(activation.name),
    )


def _at(operand: Operand, letters: list[str]) -> tuple[int, ...]:
    return tuple(operand.letters.index(letter) for letter in letters)


def _columns(axis: Axis, weight: Operand, letters: list[str], blocks: int) -> np.ndarray:
    """The numbers of one axis as ``[blocks, columns]``; along rows they are coupled, so that the first row
    speaks for all.
    """
    numbers = axis.numbers
    for dim, letter in enumerate(weight.letters):
        if letter not in letters:
            numbers = numbers.narrow(dim, 0, 1)
    sizes = [weight.size(letter) for letter in letters]
    dims = [weight.letters.index(letter) for letter in letters]
    laid = numbers.permute([*dims, *(dim for dim in range(numbers.dim()) if dim not in dims)]).reshape(
        [numbers.shape[dim] for dim in dims]
    )
    return laid.expand(sizes).reshape(int(np.prod(sizes[:blocks], dtype=int)), -1).numpy()


def want_blocks(facts: Facts, numbering: Numbering, weight: Operand, axis: Axis, letter: str) -> None:
    """Ask that the dimension of the weight which ``axis`` numbers be numbered apart for every position of
    ``letter``.
    """
    dim = weight.letters.index(letter)
    others = (other for other in weight.value.axes if other is not axis and other.numbers.shape[dim] > 1)
    divider, slot = next((other.slot for other in others), None), axis.slot
    if divider is None or slot is None or divider == slot or slot[0] != weight.value.origin:
        return
    own, blocks = numbering.get(*slot), numbering.get(*divider)
    # A letter that is several dimensions merged cannot be told apart as the blocks of one.
    undivided = own and blocks and {own.block_dim, blocks.block_dim} == {None}
    if blocks and undivided and blocks.size % weight.size(letter) == 0:
        facts.blocks.setdefault(slot, (blocks.dim, weight.size(letter)))
