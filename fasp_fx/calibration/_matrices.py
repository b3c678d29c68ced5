"""Read a consumer as matrices: the weight as ``[blocks, rows, columns]``, its input as tokens by columns for
every block.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fasp_fx.analysis import Analysis, Layout, Use, run_on_numbers
from fasp_fx.base import tensors_in
from fasp_fx.capturing import arguments, attribute, way_from_weight, written_names
from fasp_fx.patterns import CASTS, affine


class ConsumerMatrices:
    """One use of a weight, read as one matrix per block (one block unless the weight is stacked or a
    convolution grouped).

    A convolution's columns are its input channels times the positions of its window; its tokens are the
    positions of its output.

    Args:
        use: the use.
        values: the values of the analysis, by node.
    """

    def __init__(self, use: Use, values: dict[fx.Node, Any]) -> None:
        self.use, self.values = use, values
        #: channel numbers, shape ``[blocks, columns, axes]``
        self.columns = use.columns
        self._moves = [node for node in way_from_weight(use.operand)[1:] if str(node.target) not in CASTS]

    @property
    def key(self) -> tuple[Any, ...]:
        """Uses with equal keys read the same weight in the same way."""
        moves = tuple((str(node.target), str(node.args[1:]), str(node.kwargs)) for node in self._moves)
        return self.use.weight, self.use.columns.tobytes(), self.use.weight_layout, moves

    def moved(self, tensor: Tensor) -> Tensor:
        """A tensor like the weight as it reaches the use: sliced, transposed and so on as the weight is."""
        for node in self._moves:
            is_item = node.target is operator.getitem
            tensor = tensor[node.args[1]] if is_item else run_on_numbers(node, tensor, self.values)  # type: ignore[index]
        return tensor

    def read(self, weight: Tensor) -> Tensor:
        """The weight as ``[blocks, rows, columns]``."""
        operand, order = self._divided(self.moved(weight))
        blocks, columns = self.use.columns.shape[:2]
        return operand.permute(order).reshape(blocks, -1, columns)

    def _divided(self, moved: Tensor) -> tuple[Tensor, list[int]]:
        """The weight at the use with its dimensions divided, and these in the order blocks, rows, columns."""
        layout, operand = self.use.weight_layout, _divided(moved, self.use.weight_layout)
        rows = [dim for dim in range(operand.dim()) if dim not in (*layout.blocks, *layout.columns)]
        return operand, [*layout.blocks, *rows, *layout.columns]

    def rows(self, weight: Tensor) -> int:
        """How many rows the blocks of a weight have together."""
        return self.moved(weight).numel() // self.use.columns.shape[1]

    def write(self, matrices: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`read`: the weight ``like`` with these matrices in it; of a stack, the others
        stay as they are.
        """
        moved = self.moved(like)
        operand, order = self._divided(moved)
        laid = (
            matrices.reshape([operand.shape[dim] for dim in order])
            .permute([order.index(dim) for dim in range(len(order))])
            .reshape(moved.shape)
        )
        if not self._moves:
            return laid.contiguous()
        places = self.moved(torch.arange(like.numel(), device=like.device).reshape(like.shape)).reshape(-1)
        flat = like.clone(memory_format=torch.contiguous_format).reshape(-1)
        flat[places] = laid.reshape(-1)
        return flat.reshape(like.shape)

    def tokens(
        self, activation: Tensor, roles: Tensor, ends: Tensor | None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The input's tokens for each block, piece by piece: (block, ``[tokens, columns]``, their roles
        ``[tokens]``).

        Args:
            activation: the value of the use's activation.
            roles: what each position is for (``_statistics.py``), with as many dimensions as the
                activation, of its size or 1; of a routed use ``[tokens]``.
            ends: for a routed use, where each block's tokens end.
        """
        layout = self.use.activation_layout
        blocks, columns = self.use.columns.shape[:2]
        if ends is not None:
            flat = activation.movedim(layout.columns[0], -1).reshape(-1, columns)
            start = 0
            for block, end in enumerate(ends.tolist()):
                yield block, flat[start:end], roles[start:end]
                start = end
            return
        # Windows overlap, so that their tokens are many times the input: one sample at a time.
        whole = (
            not layout.windows
            or any(split[0] == 0 for split in layout.splits)
            or 0 in (*layout.blocks, *layout.columns, *(w.dim for w in layout.windows))
        )
        roles = roles.expand(activation.shape)
        for piece, its_roles in (
            [(activation, roles)] if whole else zip(activation.split(1), roles.split(1), strict=True)
        ):
            matrix = _laid(_divided(piece, layout), layout)
            # A token is read along all its columns, and along a window: one position there stands for all, or
            # the most of them.
            first = _divided(its_roles, layout)
            for dim in layout.columns:
                first = first.narrow(dim, 0, 1)
            kinds = _laid(first, layout).amax(-1)
            yield from zip(
                range(blocks), matrix.expand(blocks, -1, -1), kinds.expand(blocks, -1), strict=True
            )


def states_before(start: Tensor, states: Tensor, steps: int) -> Tensor:
    """What a recurrent weight is contracted with: the states of the step before, of the first step ``start``;
    steps lie along dimension ``steps``.
    """
    first = start.movedim(0, steps).expand(states.narrow(steps, 0, 1).shape)
    return torch.cat([first, states.narrow(steps, 0, states.shape[steps] - 1)], steps)


def token_dims(rank: int, layout: Layout) -> list[int]:
    """The dimensions of an operand along which tokens lie, and neither blocks nor columns."""
    origin = list(range(rank))
    for dim, _ in layout.splits:
        origin.insert(dim, origin[dim])
    taken = {origin[dim] for dim in (*layout.blocks, *layout.columns)}
    return [dim for dim in range(rank) if dim not in taken]


def _laid(operand: Tensor, layout: Layout) -> Tensor:
    """A divided operand as ``[blocks, tokens, columns]``; columns include the positions of windows."""
    for window in layout.windows:
        operand = torch.nn.functional.pad(
            operand, [*([0, 0] * (operand.dim() - 1 - window.dim)), *window.padding]
        )
        operand = operand.unfold(window.dim, (window.size - 1) * window.dilation + 1, window.stride)[
            ..., :: window.dilation
        ]
    rank = operand.dim() - len(layout.windows)
    rest = [dim for dim in range(rank) if dim not in (*layout.blocks, *layout.columns)]
    laid = operand.permute([*layout.blocks, *rest, *layout.columns, *range(rank, operand.dim())])
    first, last = len(layout.blocks), len(layout.blocks) + len(rest)
    return laid.reshape(
        math.prod(laid.shape[:first]), math.prod(laid.shape[first:last]), math.prod(laid.shape[last:])
    )


def _divided(tensor: Tensor, layout: Layout) -> Tensor:
    for dim, first in layout.splits:
        tensor = tensor.unflatten(dim, (first, -1))
    return tensor


def read_otherwise(analysis: Analysis, matrices: ConsumerMatrices) -> str | None:
    """Why a repair of a weight for one reading would change more than this reading, or ``None``.

    A repair minimises the error of a weight as the consumer of one kind of input. It would also change what
    the same entries compute as a producer, as an embedding, or as a consumer read in another way (a
    transposed tied weight).
    """
    weight = matrices.use.weight
    uses = [use for use in analysis.walk.facts.uses if use.weight == weight]
    canonical, nodes = analysis.program.canonical(), analysis.program.module.graph.find_nodes(op="get_attr")
    names = [node for node in nodes if canonical.get(str(node.target)) == weight]
    inside = {*names, *(node for use in uses for node in way_from_weight(use.operand))}
    known = {(use.operand, use.node) for use in uses if use.activation is not use.operand}
    for user in (user for node in inside for user in node.users if (node, user) not in known):
        if user not in inside and computes(user):
            return f"it is also read by '{user.name}' ({user.target}), which a repair would change"
    shape = attribute(analysis.program.module, weight).shape
    for other in (ConsumerMatrices(use, analysis.walk.values) for use in uses):
        is_same = other.key == matrices.key
        if not is_same and np.intersect1d(_places(matrices, shape), _places(other, shape)).size:
            return (
                f"'{other.use.node.name}' reads the same entries in another way, which a repair would change"
            )
    return None


def computes(node: fx.Node) -> bool:
    """Whether a node gives a tensor, or is the output; others look at sizes and types alone."""
    return node.op == "output" or "val" not in node.meta or bool(tensors_in(node.meta["val"]))


def _places(matrices: ConsumerMatrices, shape: torch.Size) -> np.ndarray:
    """Which entries of a weight are read."""
    return np.unique(matrices.moved(torch.arange(shape.numel()).reshape(shape)).numpy())


def bias_of(analysis: Analysis, uses: Sequence[Use], matrices: ConsumerMatrices) -> str | None:
    """The parameter that is added to every token of a consumer's output and read nowhere else, by its
    canonical name.

    Args:
        uses: those of the consumer.
        matrices: the weight as matrices, whose rows are the bias' entries, block after block.
    """
    use, module, canonical = uses[0], analysis.program.module, analysis.program.canonical()
    named, form = arguments(use.node), affine(use.node.target)
    if len(uses) > 1 or form is None or any(named.get(name, 1) != 1 for name in ("alpha", "beta")):
        return None
    bias = named.get(str(form.bias))
    if not isinstance(bias, fx.Node) or list(bias.users) != [use.node]:
        return None
    name, others = canonical.get(str(bias.target), ""), module.graph.find_nodes(op="get_attr")
    if [node for node in others if canonical.get(str(node.target)) == name] != [bias]:
        return None
    parameter, matrix = attribute(module, str(bias.target)), attribute(module, use.weight)
    fits = isinstance(parameter, nn.Parameter) and name not in written_names(module.graph)
    is_one = parameter.dtype == matrix.dtype and parameter.shape == (matrices.rows(matrix),)
    return name if fits and is_one else None
