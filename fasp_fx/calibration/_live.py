"""How many bytes of activations a program holds at each of its nodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx

from ..base.compat import pytree
from ..capturing._fx import viewed

#: the shape of what a node makes
ShapeOf = Callable[[fx.Node], tuple[int, ...]]


def live_bytes(graph: fx.Graph, sizes: Callable[[torch.Size], Iterable[int]]) -> list[int]:
    """Bytes of all values that have been made and will be used again, after each node, in graph order; views
    and weights take none.

    What the program returns is not kept for that (see :class:`fasp_fx.capturing._runner.Runner`).

    Args:
        sizes: a recorded shape as numbers.
    """
    nodes = list(graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    owner: dict[fx.Node, fx.Node] = {}
    dies: dict[fx.Node, int] = {}
    for node in nodes:
        owner[node] = viewed(node)
        last = max((place[user] for user in node.users if user.op != "output"), default=place[node])
        dies[owner[node]] = max(dies.get(owner[node], 0), last)
    change = [0] * (len(nodes) + 1)
    for node, last in dies.items():
        taken = (
            0
            if node.op in ("get_attr", "output")
            else sum(_bytes(leaf, sizes) for leaf in pytree.tree_leaves(node.meta.get("val")))
        )
        change[place[node]] += taken
        change[last + 1] -= taken  # what a node reads is there while it is executed
    found, total = [], 0
    for index in range(len(nodes)):
        total += change[index]
        found.append(total)
    return found


def _bytes(value: object, sizes: Callable[[torch.Size], Iterable[int]]) -> int:
    return math.prod(sizes(value.shape)) * value.dtype.itemsize if isinstance(value, Tensor) else 0


__all__ = ["live_bytes"]
