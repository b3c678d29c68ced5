"""Keep means over channels what they were once some of the channels are gone.

In the dense model whose producers are zero there, a mean divides by the dense count, and so does the variance
of a layer norm, to which each zero contributes the square of the mean.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fasp_fx.analysis.channels import Value, Walk
from fasp_fx.base._stamps import WRITTEN_BY, stamp
from fasp_fx.capturing._fx import arguments
from fasp_fx.errors import VerificationError

from ._kept import Kept, gone_from
from ._run import GraphPass
from ._verify import walk_of

if TYPE_CHECKING:
    from fasp_fx.analysis._analysis import Analysis
    from fasp_fx.analysis.plan import PruningPlan
    from fasp_fx.capturing._program import Program

_ATEN = torch.ops.aten
#: key of ``node.meta["custom"]`` under which nodes carry the digest of the removal that they are for
_FOR = "fasp_fx_counted_for"
_NARROW = (torch.float16, torch.bfloat16)


class KeepDenseCount(GraphPass):
    """Precondition: no channel has been removed yet.

    Postcondition: with the channels of ``removal`` removed, means, layer norms and norms by mean squares over
    them divide by the dense count. Other operators that mix channels (softmax, group norm) work on what is
    left.

    Args:
        removal: a plan, or a boolean for each channel number of the analysis.
    """

    name = "keep_dense_count"

    def __init__(self, removal: PruningPlan | np.ndarray) -> None:
        self.removal: PruningPlan | np.ndarray = removal

    def rewrite(self, program: Program, analysis: Analysis) -> Program:
        gone = gone_from(self.removal, analysis)
        kept, walk, removal = Kept(gone), walk_of(program, analysis), hashlib.sha256(gone).hexdigest()
        if any(_counted_for(node) == removal for node in program.module.graph.nodes):
            raise VerificationError(
                "means divide by the dense count already; this pass comes once for a removal, and Prune(plan)"
                " has it inside"
            )
        shares = {
            node.name: share
            for node in program.module.graph.nodes
            if (share := _share(node, kept, walk)) != 1.0
        }
        if not shares:
            return program
        dtypes = {
            node.name: walk.executed[node.all_input_nodes[0]].dtype
            for node in program.module.graph.nodes
            if node.name in shares
        }
        program = program.copy()
        graph = program.module.graph
        for node in [node for node in graph.nodes if node.name in shares]:
            _REWRITES[node.target](graph, node, shares[node.name], dtypes[node.name], self.name)
        for node in graph.nodes:
            if node.meta.get(WRITTEN_BY) == self.name and _counted_for(node) is None:
                node.meta["custom"] = {**node.meta["custom"], _FOR: removal}
        return program


def _counted_for(node: fx.Node) -> str | None:
    """The digest of the removal for which a node was written by this pass."""
    found: str | None = node.meta.get("custom", {}).get(_FOR)
    return found


def _share(node: fx.Node, kept: Kept, walk: Walk) -> float:
    """The share of positions that stay, of those over which the node takes a mean; 1 for other nodes."""
    if node.op != "call_function" or node.target not in _REWRITES:
        return 1.0
    given = arguments(node)
    source = walk.values.get(next(iter(given.values())))
    if not isinstance(source, Value):
        return 1.0
    rank = len(source.shape)
    if node.target in (_ATEN.mean.dim, _ATEN.mean.default):
        dims = [dim % rank for dim in given["dim"]] if given.get("dim") else list(range(rank))
    else:
        dims = list(range(rank - len(given["normalized_shape"]), rank))
    share = 1.0
    for dim in dims:
        share *= kept.size(source, dim) / source.shape[dim]
    return share


def _mean(graph: fx.Graph, node: fx.Node, share: float, dtype: torch.dtype, name: str) -> None:
    with graph.inserting_after(node):
        scaled = stamp(graph.call_function(_ATEN.mul.Tensor, (node, share)), name, node)
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def _norm(graph: fx.Graph, node: fx.Node, share: float, dtype: torch.dtype, name: str) -> None:
    """Write out a layer norm, or a norm by mean squares, with means over the dense count."""

    def write(operator: Any, *args: Any) -> fx.Node:
        with graph.inserting_before(node):
            return stamp(graph.call_function(operator, args), name, node)

    def mean(of: fx.Node) -> fx.Node:
        dims = list(range(-len(given["normalized_shape"]), 0))
        return write(_ATEN.mul.Tensor, write(_ATEN.mean.dim, of, dims, True), share)

    given = arguments(node)
    # Narrow types are computed in float32, whose precision stands for an eps that is not given.
    computed = torch.float32 if dtype in _NARROW else dtype
    eps = given["eps"] if given["eps"] is not None else torch.finfo(computed).eps
    value = given["input"] if computed == dtype else write(_ATEN.to.dtype, given["input"], computed)
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
        if given.get(factor) is not None:
            result = write(operator, result, given[factor])
    node.replace_all_uses_with(result)
    graph.erase_node(node)


_REWRITES = {
    _ATEN.mean.dim: _mean,
    _ATEN.mean.default: _mean,
    _ATEN.layer_norm.default: _norm,
    _ATEN.rms_norm.default: _norm,
}
