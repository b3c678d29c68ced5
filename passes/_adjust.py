"""What stands around removed channels: residual blocks of which nothing is left, and what depends on a width.

In the dense model whose producers are zero there, a mean divides by the dense count, and so does the variance
of a layer norm, to which each zero contributes the square of the mean. Attention divides by the square root
of the heads' width, and its fused kernels want query, key and value heads of one width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import fx

from fasp_fx.analysis import (
    Analysis,
    Value,
    Walk,
    beside,
    goes_with_a_block,
    laid_out,
    serving,
)
from fasp_fx.capturing import Program, arguments, put_behind, results, stamp, viewed
from fasp_fx.errors import VerificationError
from fasp_fx.patterns import affine, lookup

_ATEN = torch.ops.aten
_ATTENTION = _ATEN.scaled_dot_product_attention.default
_MEANS = (_ATEN.mean.dim, _ATEN.mean.default)
_NORMS = (_ATEN.layer_norm.default, _ATEN.rms_norm.default)


class Kept:
    """The box of kept positions of a tensor: answers how large each dimension becomes; one instance per
    removal.

    Args:
        gone: for every channel number, whether it is removed.
    """

    def __init__(self, gone: np.ndarray) -> None:
        self.gone = torch.from_numpy(np.append(gone, False))  # the last entry serves NONE (-1): never removed

    def _mask(self, value: Value, dim: int) -> torch.Tensor | None:
        """Which positions stay, laid out with ``dim`` last; ``None`` if all do."""
        masks = [~self.gone[axis.numbers] for axis in value.at(dim)]
        mask = reduce(torch.logical_and, masks) if masks else None
        return (
            None if mask is None or bool(mask.all()) else mask.movedim(dim, -1).reshape(-1, mask.shape[dim])
        )

    def touches(self, value: Value) -> bool:
        """Whether the tensor loses any position."""
        return any(self._mask(value, axis.dim) is not None for axis in value.axes)

    def before(self, value: Value, dim: int, position: int) -> int:
        """How many positions stay among the first ``position`` along ``dim``; the same in every row, or the
        layout is broken.
        """
        mask = self._mask(value, dim)
        return position if mask is None else _in_each_row(mask[:, :position], "channels", value, dim)

    def size(self, value: Value, dim: int) -> int:
        """The new size of ``dim``."""
        return self.before(value, dim, value.shape[dim])

    def factors(self, value: Value, dim: int, count: int, first: bool) -> int:
        """How many of the ``count`` parts of a dimension keep any position; ``first``: parts are runs of
        neighbours, else every ``count``-th.
        """
        mask = self._mask(value, dim)
        if mask is None:
            return count
        parts = mask.unflatten(1, (count, -1)) if first else mask.unflatten(1, (-1, count)).mT
        return _in_each_row(parts.any(-1), "groups", value, dim)


def _in_each_row(stay: torch.Tensor, what: str, value: Value, dim: int) -> int:
    """How many stay, the same number in each row."""
    counts = stay.sum(-1)
    if bool((counts != counts[0]).any()):
        raise VerificationError(
            f"unequal numbers of {what} would stay in the rows of a tensor of shape {value.shape} along"
            f" dimension {dim}"
        )
    return int(counts[0])


def keep_dense_count(program: Program, analysis: Analysis, walk: Walk, gone: np.ndarray) -> Program:
    """Let means, layer norms and norms by mean squares divide by the dense count once these channels are
    gone. Other operators that mix channels (softmax, group norm) work on what is left.
    """
    kept = Kept(gone)
    before = list(program.module.graph.nodes)
    shares = [_share(node, kept, walk) for node in before]
    if all(share == 1.0 for share in shares):
        return program
    program = program.copy()
    for node, old, share in zip(list(program.module.graph.nodes), before, shares, strict=True):
        if share != 1.0 and node.target in _MEANS:
            stamp(put_behind(node, _ATEN.mul.Tensor, share), "keep_dense_count", node)
        elif share != 1.0:
            with node.graph.inserting_before(node):
                normed = _norm(node, share, walk.executed[old.all_input_nodes[0]].dtype)
            node.replace_all_uses_with(normed)
            node.graph.erase_node(node)
    return program


def _share(node: fx.Node, kept: Kept, walk: Walk) -> float:
    """The share of positions that stay, of those over which the node takes a mean; 1 for other nodes."""
    if node.op != "call_function" or node.target not in (*_MEANS, *_NORMS):
        return 1.0
    call = arguments(node)
    source = walk.values.get(next(iter(call.values())))
    if not isinstance(source, Value):
        return 1.0
    rank = len(source.shape)
    if node.target in _MEANS:
        dims = [dim % rank for dim in call["dim"]] if call.get("dim") else range(rank)
    else:
        dims = range(rank - len(call["normalized_shape"]), rank)
    return math.prod((kept.size(source, dim) / source.shape[dim] for dim in dims), start=1.0)


def _written(by: str, like: fx.Node, operator: Any, *args: Any) -> fx.Node:
    return stamp(like.graph.call_function(operator, args), by, like)


def _norm(node: fx.Node, share: float, dtype: torch.dtype) -> fx.Node:
    """A layer norm, or a norm by mean squares, written out with means over the dense count."""

    def write(operator: Any, *args: Any) -> fx.Node:
        return _written("keep_dense_count", node, operator, *args)

    def mean(of: fx.Node) -> fx.Node:
        dims = list(range(-len(call["normalized_shape"]), 0))
        return write(_ATEN.mul.Tensor, write(_ATEN.mean.dim, of, dims, True), share)

    call = arguments(node)
    # Narrow types are computed in float32, whose precision stands for an eps that is not given.
    computed = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    eps = call["eps"] if call["eps"] is not None else torch.finfo(computed).eps
    value = call["input"] if computed == dtype else write(_ATEN.to.dtype, call["input"], computed)
    centre = mean(value) if node.target is _ATEN.layer_norm.default else None
    value = value if centre is None else write(_ATEN.sub.Tensor, value, centre)
    square = mean(write(_ATEN.mul.Tensor, value, value))
    if centre is not None:
        removed = write(_ATEN.mul.Tensor, write(_ATEN.mul.Tensor, centre, centre), 1.0 - share)
        square = write(_ATEN.add.Tensor, square, removed)
    scale = write(_ATEN.rsqrt.default, write(_ATEN.add.Tensor, square, eps))
    result = write(_ATEN.mul.Tensor, value, scale)
    if computed != dtype:
        result = write(_ATEN.to.dtype, result, dtype)
    for operator, factor in ((_ATEN.mul.Tensor, "weight"), (_ATEN.add.Tensor, "bias")):
        if call.get(factor) is not None:
            result = write(operator, result, call[factor])
    return result


def pin_attention_scale(originals: Mapping[fx.Node, fx.Node], walk: Walk) -> None:
    """Write out attention's implicit scale, 1/√(head width), before the width changes.

    Args:
        originals: of the nodes of a copy, those of the program that was walked.
    """
    for node, original in originals.items():
        if node.target is _ATTENTION and node.kwargs.get("scale") is None:
            width = int(walk.executed[original.args[0]].shape[-1])  # type: ignore[index]
            node.update_kwarg("scale", 1.0 / math.sqrt(width))
            stamp(node, "pin_attention_scale")


def pad_value_heads(program: Program, analysis: Analysis, walk: Walk, gone: np.ndarray) -> Program:
    """Pad value heads with zeros to the width of the query heads, and slice the result; or query and key
    heads to that of the value heads.

    Fused attention kernels want query, key and value heads of one width; a narrower one leaves them for a
    slower path. Scales are written out by now.
    """
    originals = program.module.graph.find_nodes(op="call_function", target=_ATTENTION)
    widths = [[int(walk.executed[node.args[at]].shape[-1]) for at in range(3)] for node in originals]
    if all(len(set(each)) == 1 for each in widths):
        return program
    program = program.copy()
    graph = program.module.graph
    copies = graph.find_nodes(op="call_function", target=_ATTENTION)
    for node, original, each in zip(copies, originals, widths, strict=True):
        for index, width in enumerate(each):
            if width < max(each):
                padding = [0, max(each) - width]
                with graph.inserting_before(node):
                    wide = _written(
                        "pad_value_heads", node, _ATEN.constant_pad_nd.default, node.args[index], padding, 0.0
                    )
                node.update_arg(index, wide)
        if each[2] < max(each):
            last = walk.executed[original].dim() - 1
            stamp(put_behind(node, _ATEN.slice.Tensor, last, 0, each[2]), "pad_value_heads", node)
    return program


def skip_blocks(program: Program, analysis: Analysis, walk: Walk, gone: np.ndarray) -> Program:
    """Where all channels of a group go that is all there is to a residual block (``include=("depth",)``),
    what reads them gives its bias, and nothing where it has none: the sum becomes what the block was added
    to. No node computes anything of such a block then; its weights are cut as others are.
    """
    kept = np.unique(analysis.labels[~gone])
    skipped = [group for group in analysis.groups if not group.needed and not np.isin(group.sets, kept).any()]
    if not skipped:
        return program
    program = program.copy()
    graph = program.module.graph
    nodes = {node.name: node for node in graph.nodes}
    ends = [nodes[use.node.name] for group in skipped for use in group.uses]
    unused = serving(ends, graph)
    for end in ends:
        if (other := beside(laid_out(end))) is None:
            raise VerificationError(f"'{end.name}' ends in no sum any more, so that it cannot be left out")
        _replace_by_bias(end, other)
    for node in unused:
        # Weights stay, to be cut; what draws random numbers, since those after it would be others; and what
        # a bias is computed of.
        if node.op == "call_function" and not node.users and goes_with_a_block(node):
            graph.erase_node(node)
    return program


def _replace_by_bias(node: fx.Node, other: fx.Node) -> None:
    """Put the bias of a contraction in its place, in the shape of the value that it ends in a sum with; where
    there is none, and nothing stands between it and the sum, that value in the place of the sum.
    """
    graph, form, end = node.graph, affine(node.target), laid_out(node)
    bias = None if form is None or form.bias is None else arguments(node)[form.bias]
    total = next(iter(end.users))
    is_sum = total.target is _ATEN.add.Tensor and other in total.all_input_nodes
    # A value can stand for a sum if its memory is that of no input and no weight, and the sum is no output,
    # that the caller may write into.
    returned = [viewed(result) for result in results(graph) if isinstance(result, fx.Node)]
    is_own = viewed(other).op == "call_function" and total not in returned
    if bias is None and len(end.users) == 1 and is_sum and is_own:
        total.replace_all_uses_with(other)
        graph.erase_node(total)
    else:
        with graph.inserting_before(end):
            stand_in = _written("skip_blocks", node, _ATEN.zeros_like.default, other)
            if bias is not None and form is not None:
                spread = _spread(node, str(form.bias), bias)
                stand_in = _written("skip_blocks", node, _ATEN.add.Tensor, stand_in, spread)
        end.replace_all_uses_with(stand_in)
    while end is not node:  # views of it
        view, end = end, end.all_input_nodes[0]
        graph.erase_node(view)


def _spread(node: fx.Node, name: str, bias: fx.Node) -> fx.Node:
    """A bias as it is added to the output of a contraction; that of a convolution is along its channels."""
    rule = lookup(node.target)
    assert rule is not None
    form = rule.alternatives[0]
    dims = next(operand.dims for operand in form.operands if operand.name == name)
    shape = [-1] + [1] * form.results[0][::-1].index(dims[-1])
    return bias if len(shape) == 1 else _written("skip_blocks", node, _ATEN.reshape.default, bias, shape)
