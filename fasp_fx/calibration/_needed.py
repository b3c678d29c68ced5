"""What one consumer takes at once of memory, and what runs up to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, fx

from ..analysis._analysis import Analysis
from ..base.compat import pytree
from ..capturing._fx import attribute, viewed
from ..capturing._sizes import Sizes
from .observe._consumers import Consumer

#: rows, blocks and columns of a consumer's matrices
Shape = tuple[int, int, int]
#: weights of float64 and of float32 take so many bytes
DOUBLE, SINGLE = 8, 4


class Needed:
    """Bytes that calibration takes on the way from one consumer to the next.

    Args:
        kind: the type of the weights, by which the activations that were recorded are narrower or wider.
        sparsity: that is asked for.

    Attributes:
        sizes: those of the graph.
        shapes: of the consumers.
        grams: of each consumer, the Gram matrices of fitted tokens and of those held out.
        pair: of the widest: as accumulated, made whole, and in the order of the system.
        waiting: activations of one batch where a consumer is observed, at the widest such place.
        running: those on the way between two such places.
        solving: what the widest consumer is repaired with.
    """

    def __init__(
        self, analysis: Analysis, consumers: Sequence[Consumer], kind: torch.dtype, sparsity: float
    ) -> None:
        module = analysis.program.module
        self.sizes = Sizes(module, small=False)
        live = live_bytes(module.graph, lambda shape: (self.sizes.integer(size) for size in shape))
        place = {node: index for index, node in enumerate(module.graph.nodes)}
        stops = [place[use.node] for consumer in consumers for use in consumer.uses]
        weights = {consumer: attribute(module, consumer.weight) for consumer in consumers}
        widest = max(weights.values(), key=Tensor.numel, default=torch.empty(0))
        narrower = kind.itemsize / widest.dtype.itemsize
        self.shapes = {consumer: _shape(consumer, weight) for consumer, weight in weights.items()}
        self.grams = [2 * SINGLE * blocks * columns**2 for _, blocks, columns in self.shapes.values()]
        self.pair = 3 * max(self.grams, default=0)
        self.waiting = round(max((live[stop] for stop in stops), default=0) * narrower)
        self.running = round(max(live[: max(stops, default=0) + 1], default=0) * narrower)
        self.solving = _solving(self.shapes.values(), sparsity)
        self._between = _between(analysis, consumers, kind)

    @property
    def on_device(self) -> int:
        """Bytes of a device that batches run on while the weights lie in files."""
        return self.running + self.pair + self.solving + self._between


def bytes_of_weights(tensors: Iterable[Tensor], kind: torch.dtype) -> int:
    """Of different tensors, if those of real numbers had a type."""
    different = {id(tensor): tensor for tensor in tensors}.values()
    return sum(
        tensor.numel() * (kind if tensor.is_floating_point() else tensor.dtype).itemsize
        for tensor in different
    )


def _between(analysis: Analysis, consumers: Iterable[Consumer], kind: torch.dtype) -> int:
    """The most bytes of weights that are read between two places where a consumer is observed."""
    graph = analysis.program.module.graph
    stops = {use.node for consumer in consumers for use in consumer.uses}
    most, read = 0, list[Tensor]()
    for node in graph.nodes:
        if node in stops:
            most, read = max(most, bytes_of_weights(read, kind)), []
        held = (
            attribute(analysis.program.module, str(own.target))
            for own in node.all_input_nodes
            if own.op == "get_attr"
        )
        read += [value for value in held if isinstance(value, Tensor)] if node.op == "call_function" else []
    return most


def _shape(consumer: Consumer, weight: Tensor) -> Shape:
    """Rows, blocks and columns of a consumer's matrices."""
    blocks, columns = consumer.matrices.columns.shape[:2]
    rows = consumer.matrices.moved(weight).numel() // (blocks * columns)
    return rows, blocks, columns


def _solving(shapes: Iterable[Shape], sparsity: float) -> int:
    """Bytes of the system of the widest consumer: its Gram matrix in float64, what is kept of it twice, its
    rows, and what is solved for: the removed columns, or where these are more, the rows.
    """
    most = 0.0
    for rows, _, columns in shapes:
        kept, gone = (1 - sparsity) * columns, sparsity * columns
        # Once the system is solved, one copy of what is kept is free again.
        solved = max(kept * gone, rows * kept + kept * gone - kept**2) if gone < rows else 2 * rows * kept
        most = max(most, DOUBLE * (columns**2 + 2 * kept**2 + rows * columns + solved))
    return round(most)


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


__all__ = ["DOUBLE", "SINGLE", "Needed", "Shape", "bytes_of_weights", "live_bytes"]
