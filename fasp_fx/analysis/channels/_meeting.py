"""Couple the axes of several operands that shrink the same letter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce

import numpy as np
import torch
from torch import Tensor, fx

from ...capturing._fold import WHY_NOT_FOLDED
from ...capturing._fx import arguments
from ...patterns import CASTS, lookup
from ._facts import Facts, Layout, Recurrence, Use, Window
from ._lettered import Lettered, Slide
from ._numbering import Numbering
from ._operands import NONE, Axis, Operand

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


# --- Operators that take their own result of one step before: a weight's columns that meet no tensor of the
# graph.


def meet_recurring(
    relation: Lettered,
    letter: str,
    columns: list[tuple[Operand, Tensor]],
    channels: list[Tensor],
    turn: tuple[int, int],
) -> None:
    """Couple a weight's columns with the channels of the result that they meet; columns that meet none stay.

    Args:
        columns: the weights with the numbers of their columns, ``channels`` those along the result's letter,
            all aligned.
        turn: the places of the two letters in that alignment.
    """
    state = relation.before(letter)
    for weight, numbers in columns:
        problem = (
            why_no_consumer(relation, weight, state)
            if channels and state is not None
            else f"'{weight.name}' of {relation.node.target} meets no channels"
        )
        if problem is not None:
            relation.facts.say(relation.facts.frozen, numbers, problem, relation.node)
        for own in channels:
            relation.facts.couple(numbers.transpose(*turn), own, relation.node)


def consume_recurring(relation: Lettered) -> None:
    """Record each weight that is contracted with the result one step before."""
    for letter, recurring in relation.recurs.items():
        state = relation.before(letter)
        for weight in relation.operands:
            if (
                state is None
                or recurring.start is None
                or letter not in weight.letters
                or not weight.at(letter)
            ):
                continue
            if weight.value.constant and why_no_consumer(relation, weight, state) is None:
                use = make_use(relation, weight, state)
                relation.facts.uses.append(
                    replace(use, recurrence=Recurrence(recurring.start, recurring.steps))
                )


# --- Where an expansion repeats what a weight's channels meet: what is repeated can be repeated less often.


#: operators that repeat a dimension of one, and the argument that says how often
_REPEATS = {torch.ops.aten.expand.default: "size", torch.ops.aten.repeat.default: "repeats"}


def stretched(node: fx.Node, dim: int) -> Iterator[tuple[str, int]]:
    """The expansions, each with its dimension, that give a result its size along one dimension: itself, or
    those that it is computed from, element by element or summed up along others.

    Args:
        dim: counted from the end, so that it is the same in whatever is broadcast.
    """
    seen: set[fx.Node] = set()
    reached = [(node, dim)]
    while reached:
        node, dim = reached.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _REPEATS:
            sizes = arguments(node)[_REPEATS[node.target]]
            if isinstance(sizes[dim], int) and sizes[dim] > 1 and _is_one(node.all_input_nodes[0], dim):
                yield node.name, len(sizes) + dim
        else:
            dim = _before(node, dim)
            reached += [(given, dim) for given in node.all_input_nodes if dim and not _is_one(given, dim)]


def _before(node: fx.Node, dim: int) -> int:
    """Which dimension of an operator's operands one of its result's is, both from the end; zero where that is
    not known. Operators are looked at that compute elements from those at the same place, or sum some up.
    """
    rule = lookup(node.target) if node.op == "call_function" else None
    if rule is None:
        return 0
    if str(node.target) in CASTS:
        return dim
    forms = [
        (*alternative.results, *(operand.dims for operand in alternative.operands))
        for alternative in rule.alternatives
    ]
    if not forms or any(dims != ("...",) for form in forms for dims in form):
        return 0
    if not rule.clauses:
        return dim
    if [clause.keyword for clause in rule.clauses] not in (["reduce"], ["reduce", "add"]):
        return 0
    given = arguments(node)
    rank, reduced = _rank(node.all_input_nodes[0]), given[rule.clauses[0].words[0]]
    gone = {at % rank for at in ([reduced] if isinstance(reduced, int) else reduced or range(rank))}
    if given.get("keepdim"):
        return dim if (dim % rank) not in gone else 0
    return [at for at in range(rank) if at not in gone][dim] - rank


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


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
        elif letter in relation.recurs or (letter in activation.letters and letter not in relation.kept):
            roles[letter] = "column"
        elif weight.size(letter) == 1:
            roles[letter] = "none"
        elif letter not in relation.kept:
            roles[letter] = "row" if letter in relation.inside else "lost"
        else:
            roles[letter] = "block" if letter in activation.letters else "row"
    return roles


def why_no_consumer(relation: Lettered, weight: Operand, activation: Operand) -> str | None:
    """Why this weight cannot lose columns here, or ``None`` if it can."""
    target = relation.node.target
    if weight.value.origin is None:
        why = weight.node.meta.get(WHY_NOT_FOLDED) if weight.node is not None else None
        return (
            f"'{weight.name}' of {target} is computed from weights, not a weight"
            f" itself{f'; {why}' if why else ''}"
        )
    if activation.node is None or weight.node is None:
        return f"an operand of {target} is not a tensor of the graph"
    roles = _roles(relation, weight, activation)
    if "lost" in roles.values():
        return f"'{weight.name}' of {target} is summed over a dimension that the other operand lacks"
    for letter, role in roles.items():
        if role == "column":
            for axis in weight.at(letter):
                if any(
                    roles[weight.letters[dim]] not in ("column", "block", "row", "window")
                    for dim in axis.varying()
                ):
                    return (
                        f"the columns of '{weight.name}' of {target} do not lie along dimensions of a weight"
                    )
    return None


def note_stacked(relation: Lettered, weight: Operand, activation: Operand) -> None:
    """Note the positions of a weight at each of which it holds a whole matrix, of rows and columns."""
    roles = _roles(relation, weight, activation)
    for letter in weight.letters:
        others = {role for other, role in roles.items() if other != letter}
        if {"row", "column"} <= others and roles[letter] in ("block", "row", "column"):
            relation.facts.stacked += [
                axis.numbers.reshape(-1).numpy() for axis in weight.at(letter) if axis.varying() == [axis.dim]
            ]


def part_blocks(relation: Lettered, weight: Operand, activation: Operand) -> None:
    """Ask for numbers of their own for the rows and columns of every block of a weight, where blocks would
    share them.
    """
    roles = _roles(relation, weight, activation)
    for letter, role in roles.items():
        if role == "block" and letter not in relation.routes and weight.size(letter) > 1:
            for axis in weight.value.axes:
                if (
                    roles[weight.letters[axis.dim]] in ("column", "row")
                    and axis.numbers.shape[weight.letters.index(letter)] == 1
                ):
                    want_blocks(relation.facts, relation.numbering, weight, axis, letter)


def make_use(relation: Lettered, weight: Operand, activation: Operand) -> Use:
    """The record of a consumer."""
    assert weight.node is not None
    assert activation.node is not None
    assert weight.value.origin is not None
    roles = _roles(relation, weight, activation)
    blocks = [letter for letter, role in roles.items() if role == "block"]
    columns = [letter for letter, role in roles.items() if role == "column"]
    windows = [letter for letter, role in roles.items() if role == "window"]
    by_letter = {slide.within: slide for slide in relation.slides}
    routed = any(letter in relation.routes for letter in blocks)
    activation_layout = Layout(
        activation.splits,
        () if routed else tuple(activation.letters.index(letter) for letter in blocks),
        tuple(activation.letters.index(letter) for letter in columns),
        tuple(
            Window(
                activation.letters.index(by_letter[letter].over),
                weight.size(letter),
                by_letter[letter].stride,
                _padding(by_letter[letter], weight.size(letter)),
                by_letter[letter].dilation,
            )
            for letter in windows
        ),
    )
    weight_layout = Layout(
        weight.splits,
        tuple(weight.letters.index(letter) for letter in blocks),
        tuple(weight.letters.index(letter) for letter in (*columns, *windows)),
    )
    route = None
    if routed:
        route = next(
            o.node
            for o in relation.operands
            if o is not weight and any(letter in o.letters for letter in relation.routes)
        )
    axes = [axis for letter in columns for axis in weight.at(letter)]
    numbers = np.stack(
        [_columns(axis, weight, [*blocks, *columns, *windows], len(blocks)) for axis in axes], axis=-1
    )
    slots = frozenset(axis.slot for axis in axes if axis.slot is not None)
    single = weight.at(blocks[0]) if len(blocks) == 1 else []
    own = (
        single[0].numbers.reshape(-1).numpy() if len(single) == 1 and len(single[0].varying()) == 1 else None
    )
    return Use(
        relation.node,
        weight.value.origin,
        weight.node,
        activation.node,
        numbers,
        slots,
        weight_layout,
        activation_layout,
        route,
        own,
    )


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
    divider = next(
        (other for other in weight.value.axes if other is not axis and other.numbers.shape[dim] > 1), None
    )
    if (
        divider is None
        or axis.slot is None
        or divider.slot is None
        or axis.slot[0] != weight.value.origin
        or axis.slot == divider.slot
    ):
        return
    own, slot = numbering.get(*axis.slot), numbering.get(*divider.slot)
    if slot is None or slot.size % weight.size(letter):
        return  # the letter is several dimensions merged, which cannot be told apart as the blocks of one
    if own is not None and own.block_dim is None and slot.block_dim is None:
        facts.blocks.setdefault(axis.slot, (slot.dim, weight.size(letter)))
