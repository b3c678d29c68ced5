"""Keep attention exact and fast once its heads have changed width."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._base import stamp
from ._verify import verify

if TYPE_CHECKING:
    from fasp_fx._program import Program
    from fasp_fx.analysis import Analysis

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class PinAttentionScale:
    """Write out attention's implicit scale, 1/√(head width), before the width changes.

    Postcondition: every fused attention has an explicit ``scale``.
    """

    name = "pin_attention_scale"

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis

    def __call__(self, program: Program) -> Program:
        if not any(node.kwargs.get("scale") is None for node in program.module.graph.find_nodes(op="call_function", target=_ATTENTION)):
            return program
        widths = {
            n.name: self.analysis.walk.executed[n.args[0]].shape[-1]
            for n in self.analysis.program.module.graph.find_nodes(op="call_function", target=_ATTENTION)
        }
        program = program.copy()
        for node in program.module.graph.find_nodes(op="call_function", target=_ATTENTION):
            if node.kwargs.get("scale") is None and node.name in widths:
                node.update_kwarg("scale", 1.0 / math.sqrt(widths[node.name]))
                stamp(node, self.name)
        return program


class PadValueHeads:
    """Pad value heads with zeros to the width of the query heads, and slice the result; or query and key heads to that of the value heads.

    Fused attention kernels want query, key and value heads of one width; a narrower one leaves them for a slower path.
    Postcondition: every fused attention has equal widths; the results are those of the unpadded program.
    """

    name = "pad_value_heads"

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis

    def __call__(self, program: Program) -> Program:
        walk = verify(program, self.analysis)
        narrow = {
            node.name: (_width(walk.executed[node.args[0]]), _width(walk.executed[node.args[2]]))
            for node in program.module.graph.find_nodes(op="call_function", target=_ATTENTION)
            if _width(walk.executed[node.args[2]]) != _width(walk.executed[node.args[0]])
        }
        if not narrow:
            return program
        ranks = {node.name: walk.executed[node].dim() for node in program.module.graph.find_nodes(op="call_function", target=_ATTENTION)}
        program = program.copy()
        graph = program.module.graph
        for node in graph.find_nodes(op="call_function", target=_ATTENTION):
            if node.name not in narrow:
                continue
            query, value = narrow[node.name]
            if query < value:
                for index in (0, 1):
                    with graph.inserting_before(node):
                        wide = graph.call_function(torch.ops.aten.constant_pad_nd.default, (node.args[index], [0, value - query], 0.0))
                        node.update_arg(index, stamp(wide, self.name, node))
                continue
            with graph.inserting_before(node):
                padded = stamp(graph.call_function(torch.ops.aten.constant_pad_nd.default, (node.args[2], [0, query - value], 0.0)), self.name, node)
            with graph.inserting_after(node):
                cut = stamp(
                    graph.call_function(torch.ops.aten.slice.Tensor, (node, ranks[node.name] - 1, 0, value)),
                    self.name,
                    node,
                )
            node.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)
            node.update_arg(2, padded)
        return program


def _width(tensor: Tensor) -> int:
    return int(tensor.shape[-1])
