"""Leave out residual blocks of which all channels go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from fasp_fx.analysis._depth import BIASES, beside, goes_with_a_block, laid_out, serving
from fasp_fx.base._stamps import stamp
from fasp_fx.capturing._fx import arguments, results, viewed
from fasp_fx.capturing._sizes import same_sizes
from fasp_fx.errors import VerificationError

from ._kept import gone_from
from ._run import Pass

if TYPE_CHECKING:
    from fasp_fx.analysis._analysis import Analysis
    from fasp_fx.analysis.plan import PruningPlan
    from fasp_fx.capturing._program import Program

_ATEN = torch.ops.aten


class SkipBlocks(Pass):
    """Where all channels of a group go that is all there is to a residual block (``include=("depth",)``),
    what reads them gives its bias, and nothing where it has none: the sum becomes what the block was added
    to.

    Precondition: no channel has been removed yet. Postcondition: no node computes anything of such a block;
    :class:`RemoveChannels` takes its weights.

    Args:
        removal: a plan, or a boolean for each channel number of the analysis.
    """

    name = "skip_blocks"

    def __init__(self, removal: PruningPlan | np.ndarray) -> None:
        self.removal: PruningPlan | np.ndarray = removal

    def rewrite(self, program: Program, analysis: Analysis) -> Program:
        gone = gone_from(self.removal, analysis)
        kept = np.unique(analysis.labels[~gone])
        skipped = [
            group for group in analysis.groups if not group.needed and not np.isin(group.sets, kept).any()
        ]
        if not skipped:
            return program
        program = program.copy()
        graph = program.module.graph
        nodes = {node.name: node for node in graph.nodes}
        ends = [nodes.get(use.node.name) for group in skipped for use in group.uses]
        unused = serving([end for end in ends if end is not None], graph)
        for end, use in zip(ends, (use for group in skipped for use in group.uses), strict=True):
            other = None if end is None or end.target is not use.node.target else beside(laid_out(end))
            if end is None or other is None:
                raise VerificationError(
                    f"'{use.node.name}' is not what the block was found by any more, so that it cannot be"
                    " left out"
                )
            _replace_by_bias(end, other, self.name)
        for node in unused:
            # Weights stay, to be cut; what draws random numbers, since those after it would be others; and
            # what a bias is computed of.
            if node.op == "call_function" and not node.users and goes_with_a_block(node):
                graph.erase_node(node)
        return program


def _replace_by_bias(node: fx.Node, other: fx.Node, name: str) -> None:
    """Put the bias of a contraction in its place, in the shape of the value that it ends in a sum with; where
    there is none, and nothing stands between it and the sum, that value in the place of the sum.
    """
    graph, key, end = node.graph, BIASES[node.target], laid_out(node)
    bias = None if key is None else arguments(node)[key]
    total = next(iter(end.users))
    if bias is None and len(end.users) == 1 and _is_sum(total, other) and _stands_for(other, total):
        total.replace_all_uses_with(other)
        graph.erase_node(total)
    else:
        with graph.inserting_before(end):
            layout: dict[str, Any] = {"memory_format": _memory_format(end.meta["val"])}
            found = stamp(graph.call_function(_ATEN.zeros_like.default, (other,), layout), name, node)
            if bias is not None:
                spread = _spread(node, bias, name)
                found = stamp(graph.call_function(_ATEN.add.Tensor, (found, spread)), name, node)
        end.replace_all_uses_with(found)
    while end is not node:  # views of it
        before = end.all_input_nodes[0]
        graph.erase_node(end)
        end = before


def _is_sum(total: fx.Node, other: fx.Node) -> bool:
    return total.target is _ATEN.add.Tensor and other in total.all_input_nodes


def _stands_for(other: fx.Node, total: fx.Node) -> bool:
    """Whether a value can stand for a sum: it lies in memory as the sum does (a view may depend on it), in
    memory that is no input and no weight, and the sum is no output, that the caller may write into.
    """
    first, second = other.meta["val"], total.meta["val"]
    is_new = viewed(other).op == "call_function"
    returned = [viewed(result) for result in results(total.graph) if isinstance(result, fx.Node)]
    return same_sizes(first.stride(), second.stride()) and is_new and total not in returned


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """How a tensor lies in memory: dense, with its dimensions in order, or with the channels last; what is
    neither is taken to lie as what it is like.
    """
    sizes = tensor.shape
    formats = {tuple(range(len(sizes))): torch.contiguous_format}
    if len(sizes) in _CHANNELS_LAST:
        formats[0, *range(2, len(sizes)), 1] = _CHANNELS_LAST[len(sizes)]
    for order, memory_format in formats.items():
        strides: dict[int, int | torch.SymInt] = {}
        step: int | torch.SymInt = 1
        for dim in reversed(order):
            strides[dim], step = step, step * sizes[dim]
        if same_sizes([strides[dim] for dim in range(len(sizes))], tensor.stride()):
            return memory_format
    return torch.preserve_format


def _spread(node: fx.Node, bias: fx.Node, name: str) -> fx.Node:
    """A bias as it is added to the output of a contraction; that of a convolution is along its channels."""
    beyond = _BEYOND.get(node.target, 0)
    if not beyond:
        return bias
    shape = [-1] + [1] * beyond
    return stamp(node.graph.call_function(_ATEN.reshape.default, (bias, shape)), name, node)


#: how many dimensions the output of a convolution has behind its channels
_BEYOND: dict[Any, int] = {_ATEN.conv1d.default: 1, _ATEN.conv2d.default: 2, _ATEN.conv3d.default: 3}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

__all__ = ["SkipBlocks"]
