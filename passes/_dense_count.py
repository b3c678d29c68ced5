"""Keep means over channels what they were once some of the channels are gone.

In the dense model whose producers are zero there, a mean divides by the dense count, and so does the variance
of a layer norm, to which each zero contributes the square of the mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from fasp_fx.analysis import Analysis, Value, Walk
from fasp_fx.capturing import Program, arguments, stamp

from ._kept import Kept

_ATEN = torch.ops.aten
_MEANS = (_ATEN.mean.dim, _ATEN.mean.default)
_NORMS = (_ATEN.layer_norm.default, _ATEN.rms_norm.default)
_NARROW = (torch.float16, torch.bfloat16)


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
            with node.graph.inserting_after(node):
                scaled = _written(node, _ATEN.mul.Tensor, node, share)
            node.replace_all_uses_with(scaled, delete_user_cb=lambda user, own=scaled: user is not own)
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
        dims = [dim % rank for dim in call["dim"]] if call.get("dim") else list(range(rank))
    else:
        dims = list(range(rank - len(call["normalized_shape"]), rank))
    share = 1.0
    for dim in dims:
        share *= kept.size(source, dim) / source.shape[dim]
    return share


def _written(like: fx.Node, operator: Any, *args: Any) -> fx.Node:
    return stamp(like.graph.call_function(operator, args), "keep_dense_count", like)


def _norm(node: fx.Node, share: float, dtype: torch.dtype) -> fx.Node:
    """A layer norm, or a norm by mean squares, written out with means over the dense count."""

    def write(operator: Any, *args: Any) -> fx.Node:
        return _written(node, operator, *args)

    def mean(of: fx.Node) -> fx.Node:
        dims = list(range(-len(call["normalized_shape"]), 0))
        return write(_ATEN.mul.Tensor, write(_ATEN.mean.dim, of, dims, True), share)

    call = arguments(node)
    # Narrow types are computed in float32, whose precision stands for an eps that is not given.
    computed = torch.float32 if dtype in _NARROW else dtype
    eps = call["eps"] if call["eps"] is not None else torch.finfo(computed).eps
    value = call["input"] if computed == dtype else write(_ATEN.to.dtype, call["input"], computed)
    if node.target is _ATEN.layer_norm.default:
        centre = mean(value)
        value = write(_ATEN.sub.Tensor, value, centre)
        square = mean(write(_ATEN.mul.Tensor, value, value))
        removed = write(_ATEN.mul.Tensor, write(_ATEN.mul.Tensor, centre, centre), 1.0 - share)
        square = write(_ATEN.add.Tensor, square, removed)
    else:
        square = mean(write(_ATEN.mul.Tensor, value, value))
    scale = write(_ATEN.rsqrt.default, write(_ATEN.add.Tensor, square, eps))
    result = write(_ATEN.mul.Tensor, value, scale)
    if computed != dtype:
        result = write(_ATEN.to.dtype, result, dtype)
    for operator, factor in ((_ATEN.mul.Tensor, "weight"), (_ATEN.add.Tensor, "bias")):
        if call.get(factor) is not None:
            result = write(operator, result, call[factor])
    return result
