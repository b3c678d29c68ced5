"""Interpret a program on channel numbers, as often as it takes until weights are numbered in the blocks that
the graph asks for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx

from ..capturing._fx import attribute
from ..capturing._program import Program
from .channels import Interpreter, Numbering, Slot, Walk, marked

#: channel numbers that are coupled, entry by entry, and the node that couples them
Pairs = list[tuple[np.ndarray, np.ndarray, fx.Node]]


def walk_program(program: Program, heads: bool, experts: bool) -> tuple[Numbering, Walk]:
    """Interpret the program, again where a weight is better numbered block by block or some channels go
    together.
    """
    blocked = _cached_heads(program)
    stretched: set[tuple[str, int]] = set()
    while True:
        numbering = Numbering(blocked, stretched)
        walk = _interpret(program, numbering, heads, experts)
        if walk.facts.blocks.keys() <= blocked.keys() and walk.facts.stretched <= stretched:
            break
        blocked = {**walk.facts.blocks, **blocked}
        stretched |= walk.facts.stretched
    walk.facts.pairs += _columns_of_parts(program, numbering)
    in_heads, coupled = _numbered(walk.facts.heads), _numbered(walk.facts.heads + walk.facts.together)
    coupled += _same_elsewhere(coupled, walk.facts.pairs, numbering.total) if coupled else []
    before = -1
    while coupled and (sets := int(label_sets(numbering.total, coupled).max())) != before:
        # What goes together along one dimension may have to along the next.
        walk, before = _walk_together(program, numbering, coupled, coupled, experts), sets
        coupled = coupled + _numbered(walk.facts.together)
    if coupled:
        walk = _walk_together(program, numbering, coupled, walk.facts.pairs, experts)
    walk.facts.heads = in_heads
    return numbering, walk


def _cached_heads(program: Program) -> dict[tuple[str, int], tuple[int, int]]:
    """A cache ``[batch, heads, length, width]`` may lose other channels in each head, as the weights that
    fill it may.
    """
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for node in program.placeholders():
        value = node.meta.get("val")
        if node.name in program.state_inputs and isinstance(value, Tensor) and value.dim() == 4:
            heads, width = value.shape[1], value.shape[3]
            if (
                isinstance(heads, int)
                and isinstance(width, int)
                and not isinstance(value.shape[2], int)
                and heads > 1
            ):
                found[(node.name, 3)] = (1, heads)
    return found


def _columns_of_parts(program: Program, numbering: Numbering) -> Pairs:
    """The columns of weights that are rows of one go together, as the plan names them by that one."""
    nodes = {node.target: node for node in program.module.graph.find_nodes(op="get_attr")}
    first: dict[tuple[str, int], Slot] = {}
    found: Pairs = []
    for name, part in program.parts.items():
        for dim in (dim for dim in range(attribute(program.module, name).dim()) if dim != part.dim):
            slot = numbering.get(name, dim)
            if slot is not None and name in nodes:
                leader = first.setdefault((part.source, dim), slot)
                found.append(
                    (leader.numbers().reshape(-1).numpy(), slot.numbers().reshape(-1).numpy(), nodes[name])
                )
    return found


def _numbered(pairs: Pairs) -> Pairs:
    return [(a[both], b[both], node) for a, b, node in pairs if (both := (a >= 0) & (b >= 0)).any()]


def _same_elsewhere(coupled: Pairs, pairs: Pairs, total: int) -> Pairs:
    """The pairs that couple one to one what goes together with what has other numbers, such as the keys of a
    cache with those that join them.

    Positions that several channels share, such as the angles by which all heads are turned, need not go with
    a whole head.
    """
    together = marked(total, *(side for pair in coupled for side in pair[:2]))
    found = []
    for a, b, node in _numbered(pairs):
        span = int(b.max()) + 1
        both = np.divmod(np.unique(a * span + b), span)
        one_to_one = all(len(np.unique(side)) == len(side) for side in both)
        if one_to_one and not np.array_equal(*both) and any(together[side].any() for side in both):
            found.append((both[0], both[1], node))
    return found


def _walk_together(
    program: Program, numbering: Numbering, coupled: Pairs, pairs: Pairs, experts: bool
) -> Walk:
    """Interpret with one number for all channels that ``coupled`` puts together, and those that ``pairs``
    couples with them.
    """
    everyone = np.arange(numbering.total)
    labels = label_sets(numbering.total, pairs)
    within, first = marked(numbering.total, *(labels[own] for _, own, _ in coupled)), np.empty_like(everyone)
    first[labels[::-1]] = everyone[::-1]  # the lowest number of each set is written last
    speaking = np.where(within[labels], first[labels], everyone)
    numbering.representative = torch.from_numpy(speaking)
    walk = _interpret(program, numbering, False, experts)
    spoken_for = np.flatnonzero(speaking != everyone)
    walk.facts.pairs.append((spoken_for, speaking[spoken_for], coupled[0][2]))
    return walk


def _interpret(program: Program, numbering: Numbering, heads: bool, experts: bool) -> Walk:
    return Interpreter(
        program.module,
        numbering,
        program.canonical(),
        program.state_inputs,
        program.state_outputs,
        heads=heads,
        experts=experts,
    ).run()


def label_sets(total: int, pairs: Pairs) -> np.ndarray:
    """The channel set of each of ``total`` channel numbers: the connected components of what is coupled."""
    # Of the type that scipy would make of them, so that it need not copy.
    index = np.dtype(np.int32 if total <= np.iinfo(np.int32).max else np.int64)
    none: list[Any] = [np.zeros(0, dtype=index)]
    first, second = (
        np.concatenate(none + [pair[side] for pair in pairs], dtype=index, casting="same_kind")
        for side in (0, 1)
    )
    graph = coo_matrix((np.ones(len(first)), (first, second)), shape=(total, total))
    return connected_components(graph, directed=False)[1].astype(np.int64)


__all__ = ["Pairs", "label_sets", "walk_program"]
