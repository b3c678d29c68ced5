"""How much memory calibration takes on the way from one consumer to the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, fx

from ..analysis._analysis import Analysis
from ..base.compat import pytree
from ..capturing._fx import attribute, viewed
from ..capturing._sizes import Sizes
from ._consumers import Consumer

#: weights of float64 and of float32 take so many bytes
DOUBLE, SINGLE = 8, 4


class Needed:
    """Bytes that calibration takes on the way from one consumer to the next.

    Args:
        kind: the type of the weights, by which the activations that were recorded are narrower or wider.
        sparsity: that is asked for.

    Attributes:
        grams: of each consumer, the Gram matrices of fitted tokens and of those held out.
        pair: of the widest: as accumulated, made whole, and in the order of the system.
        waiting: activations of one batch where a consumer is observed, at the widest such place.
        running: those on the way between two such places.
        solving: what the widest consumer is repaired with.
        on_device: all of it that a device holds on which batches run while the weights lie in files.
    """

    def __init__(
        self, analysis: Analysis, consumers: Sequence[Consumer], kind: torch.dtype, sparsity: float
    ) -> None:
        module = analysis.program.module
        sizes = Sizes(module, small=False)
        live = live_bytes(module.graph, lambda shape: (sizes.integer(size) for size in shape))
        place = {node: index for index, node in enumerate(module.graph.nodes)}
        stops = [place[use.node] for consumer in consumers for use in consumer.uses]
        weights = [attribute(module, consumer.weight) for consumer in consumers]
        widest = max(weights, key=Tensor.numel, default=torch.empty(0))
        narrower = kind.itemsize / widest.dtype.itemsize
        shapes = [_shape(*pair) for pair in zip(consumers, weights)]
        self.grams = [2 * SINGLE * blocks * columns**2 for _, blocks, columns in shapes]
        self.pair = 3 * max(self.grams, default=0)
        self.waiting = round(max((live[stop] for stop in stops), default=0) * narrower)
        self.running = round(max(live[: max(stops, default=0) + 1], default=0) * narrower)
        self.solving = round(max((_solving(*shape, sparsity) for shape in shapes), default=0))
        between = _between(analysis, consumers, kind)
        self.on_device = self.running + self.pair + self.solving + between


def bytes_of_weights(tensors: Iterable[Tensor], kind: torch.dtype) -> int:
    """Of different tensors, if those of real numbers had a type."""
    different = {id(tensor): tensor for tensor in tensors}.values()
    return sum(
        tensor.numel() * (kind if tensor.is_floating_point() else tensor.dtype).itemsize
        for tensor in different
    )


def live_bytes(graph: fx.Graph, sizes: Callable[[torch.Size], Iterable[int]]) -> list[int]:
    """Bytes of all values that have been made and will be used again, after each node, in graph order; views
    and weights take none.

    What the program returns is not kept for that (see :class:`fasp_fx.capturing._runner.Runner`).

    Args:
        sizes: a recorded shape as numbers.
    """
    nodes = list(graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    dies: dict[fx.Node, int] = {}
    for node in nodes:
        last = max((place[user] for user in node.users if user.op != "output"), default=place[node])
        dies[viewed(node)] = max(dies.get(viewed(node), 0), last)
    change = [0] * (len(nodes) + 1)
    for node, last in dies.items():
        if node.op not in ("get_attr", "output"):
            made = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
            taken = sum(math.prod(sizes(leaf.shape)) * leaf.dtype.itemsize for leaf in made)
            change[place[node]] += taken
            change[last + 1] -= taken  # what a node reads is there while it is executed
    return list(accumulate(change[:-1]))


def _between(analysis: Analysis, consumers: Iterable[Consumer], kind: torch.dtype) -> int:
    """The most bytes of weights that are read between two places where a consumer is observed."""
    module = analysis.program.module
    stops = {use.node for consumer in consumers for use in consumer.uses}
    most, read = 0, list[Tensor]()
    for node in module.graph.nodes:
        if node in stops:
            most, read = max(most, bytes_of_weights(read, kind)), []
        names = [str(own.target) for own in node.all_input_nodes if own.op == "get_attr"]
        values = [attribute(module, name) for name in names] if node.op == "call_function" else []
        read += [value for value in values if isinstance(value, Tensor)]
    return most


def _shape(consumer: Consumer, weight: Tensor) -> tuple[int, int, int]:
    """Rows, blocks and columns of a consumer's matrices."""
    blocks, columns = consumer.matrices.columns.shape[:2]
    rows = consumer.matrices.moved(weight).numel() // (blocks * columns)
    return rows, blocks, columns


def _solving(rows: int, blocks: int, columns: int, sparsity: float) -> float:
    """Bytes of the system of a consumer: the Gram matrix of one block in float64, what is kept of it twice,
    its rows, and what is solved for: the removed columns, or where these are more, the rows.
    """
    kept, gone = (1 - sparsity) * columns, sparsity * columns
    # Once the system is solved, one copy of what is kept is free again.
    solved = max(kept * gone, rows * kept + kept * gone - kept**2) if gone < rows else 2 * rows * kept
    return DOUBLE * (columns**2 + 2 * kept**2 + rows * columns + solved)


__all__ = ["DOUBLE", "Needed", "bytes_of_weights", "live_bytes"]
