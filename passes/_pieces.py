"""Weights of which a model takes ranges of rows apart before it uses them (``w_q, w_kv = weight.split([d, 2 *
d])``): each range becomes a weight.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Set
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx, nn

from fasp_fx.analysis.channels import Value
from fasp_fx.base._stamps import stamp
from fasp_fx.base.compat import pytree
from fasp_fx.capturing._fx import attribute, target_name
from fasp_fx.capturing._program import Program, SplitWeight, set_weight
from fasp_fx.capturing._recipes import Cut
from fasp_fx.patterns import lookup

if TYPE_CHECKING:
    from fasp_fx.analysis._analysis import Analysis

#: a node that takes a range of a weight, and the range
_Piece = tuple[fx.Node, range]


def take_apart(program: Program, analysis: Analysis, stuck: np.ndarray, by: str) -> Program:
    """Give each range of rows a weight of its own, where all of a weight is used so and its rows are among
    the channel sets ``stuck``.

    The new weights, named ``<weight>_0``, ``<weight>_1`` … where these names are free, are recorded in
    ``program.parts``. Returns the same program if there is nothing to do.
    """
    found = _packed(program, analysis, stuck)
    if not found:
        return program
    program = program.copy()
    nodes = {node.name: node for node in program.module.graph.nodes}
    for name, dim, pieces in found:
        for index, (piece, rows) in enumerate(pieces):
            new = program.free_name(f"{name}_{index}")
            add_part(program, analysis, name, new, np.array(rows), dim)
            at = nodes[piece.name]
            with program.module.graph.inserting_before(at):
                at.replace_all_uses_with(stamp(program.module.graph.get_attr(new), by))
    delete_unused(program, {name for name, _, _ in found})
    return program


def add_part(program: Program, analysis: Analysis, name: str, new: str, rows: np.ndarray, dim: int) -> None:
    """Register some rows of a weight as a weight of its own; to the verifier its channels are those of the
    whole.
    """
    weight, whole, cut = attribute(program.module, name), program.parts.get(name), Cut(dim, rows[None])
    held = _taken_out(weight.detach(), rows, dim)
    held = cut.apply(weight.detach()) if held is None else held
    set_weight(program.module, new, nn.Parameter(held, requires_grad=weight.requires_grad))
    program.recipes[new] = program.recipe(name).then(cut)
    source, indices = (name, rows) if whole is None else (whole.source, np.array(whole.rows)[rows])
    program.parts[new] = SplitWeight(new, source, dim, tuple(indices.tolist()))
    numbers = [analysis.numbering.numbers(name, d) for d in range(weight.dim())]
    own = numbers[dim]
    numbers[dim] = None if own is None else own[torch.from_numpy(rows)]
    program.numbers[new] = numbers


def _taken_out(weight: Tensor, rows: np.ndarray, dim: int) -> Tensor | None:
    """Rows that lie together, without a copy: they share the storage of the caller's weight, as all does that
    a program holds of it. ``None`` where they do not, or are all of them, which could be told from no copy.
    """
    apart = dim == 0 and weight.is_contiguous() and 0 < len(rows) < len(weight)
    if not apart or not np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return None
    return weight.narrow(0, int(rows[0]), len(rows))


def delete_unused(program: Program, names: Set[str]) -> None:
    """Take weights out of the program where nothing reads them any more, and all that was computed of them
    in vain.
    """
    # A node without users can be a second name of a tied weight, which must stay.
    program.module.graph.eliminate_dead_code(
        lambda node: node.is_impure() or (node.op == "get_attr" and node.target not in names)
    )
    delete_unread(program, names)


def delete_unread(program: Program, names: Set[str]) -> None:
    """Take weights, or parts and copies of some, out of the program where the graph does not look them up."""
    for name in names - {str(node.target) for node in program.module.graph.find_nodes(op="get_attr")}:
        program.parts.pop(name, None)
        program.recipes.pop(name, None)
        program.numbers.pop(name, None)
        path, _, leaf = name.rpartition(".")
        delattr(attribute(program.module, path) if path else program.module, leaf)


def numbers_of(analysis: Analysis, node: fx.Node) -> np.ndarray:
    """All channel numbers that a node carries."""
    values = pytree.tree_leaves(analysis.walk.values.get(node), is_leaf=lambda leaf: isinstance(leaf, Value))
    axes = [
        axis.numbers.reshape(-1).numpy()
        for value in values
        if isinstance(value, Value)
        for axis in value.axes
    ]
    numbers = np.concatenate([np.zeros(0, dtype=np.int64), *axes])
    return numbers[numbers >= 0]


def _packed(program: Program, analysis: Analysis, stuck: np.ndarray) -> list[tuple[str, int, list[_Piece]]]:
    """The weights to be taken apart, along which dimension, and the ranges; each is used in one place, by one
    name.
    """
    looked_up = program.module.graph.find_nodes(op="get_attr")
    aliases, uses = program.aliases(), Counter(node.target for node in looked_up)
    found = []
    for node in looked_up:
        name = target_name(node)
        weight = attribute(program.module, name)
        alone = uses[node.target] == 1 and len(aliases.get(name, ())) == 1 and name not in program.parts
        for dim in range(weight.dim()) if alone and isinstance(weight, nn.Parameter) and _taken(node) else ():
            slot = analysis.numbering.get(name, dim)
            if (
                slot is not None
                and slot.block_dim is None
                and np.isin(analysis.labels[slot.base : slot.base + slot.size], stuck).any()
            ):
                pieces = _pieces(node, dim, slot.base, analysis)
                if pieces is not None:
                    found.append((name, dim, pieces))
    return found


def _pieces(weight: fx.Node, dim: int, base: int, analysis: Analysis) -> list[_Piece] | None:
    """The nodes that take ranges along ``dim``, in order, if they take all of it, none of it twice, and
    nothing else is made of the weight.
    """
    shape = tuple(weight.meta["val"].shape)
    pieces: list[_Piece] = []
    for taken in _taken(weight):
        value = analysis.walk.values.get(taken)
        if not isinstance(value, Value) or len(value.shape) != len(shape):
            return None
        along = value.at(dim)
        if (
            any(a != b for d, (a, b) in enumerate(zip(value.shape, shape, strict=True)) if d != dim)
            or len(along) != 1
            or along[0].varying() != [dim]
        ):
            return None
        numbers = along[0].numbers.reshape(-1).numpy() - base
        rows = range(int(numbers[0]), int(numbers[0]) + len(numbers))
        if len(rows) == shape[dim] or not np.array_equal(numbers, np.array(rows)):
            return None
        pieces.append((taken, rows))
    pieces.sort(key=lambda piece: piece[1].start)
    covered = [position for _, rows in pieces for position in rows]
    return pieces if covered == list(range(shape[dim])) else None


def _taken(weight: fx.Node) -> list[fx.Node]:
    """What mere movement takes of a weight, as single tensors; nothing if anything else is done with it."""
    found: list[fx.Node] = []
    for user in weight.users:
        rule = lookup(user.target)
        if rule is None or rule.moves != "self":
            return []
        several = isinstance(user.meta.get("val"), (list, tuple))
        if several and any(item.target is not operator.getitem for item in user.users):
            return []
        found += list(user.users) if several else [user]
    return found
