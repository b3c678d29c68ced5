"""When a weight contracted with an activation is a consumer, and how both are read as matrices."""

from __future__ import annotations

import numpy as np

from ...capturing._fold import WHY_NOT_FOLDED
from ._facts import Facts, Layout, Use, Window
from ._lettered import Lettered, Slide
from ._numbering import Numbering
from ._operands import Operand
from ._value import Axis


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
