"""Keep attention exact and fast once its heads have changed width."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fasp_fx.base._stamps import stamp

from ._run import GraphPass
from ._verify import walk_of

if TYPE_CHECKING:
    from fasp_fx.analysis._analysis import Analysis
    from fasp_fx.capturing._program import Program

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class PinAttentionScale(GraphPass):
    """Write out attention's implicit scale, 1/√(head width), before the width changes.

    Precondition: query heads have the width that the scale is meant for; :class:`RemoveChannels` refuses to
    narrow those without an explicit scale. Postcondition: every fused attention has an explicit ``scale``;
    the results are the same.
    """

    name = "pin_attention_scale"

    def rewrite(self, program: Program, analysis: Analysis) -> Program:
        implicit = [
            node
            for node in program.module.graph.find_nodes(op="call_function", target=_ATTENTION)
            if node.kwargs.get("scale") is None
        ]
        if not implicit:
            return program
        walk = walk_of(program, analysis)
        widths = {node.name: _width(walk.executed[node.args[0]]) for node in implicit}
        program = program.copy()
        for node in program.module.graph.find_nodes(op="call_function", target=_ATTENTION):
            if node.name in widths:
                node.update_kwarg("scale", 1.0 / math.sqrt(widths[node.name]))
                stamp(node, self.name)
        return program


class PadValueHeads(GraphPass):
    """Pad value heads with zeros to the width of the query heads, and slice the result; or query and key
    heads to that of the value heads.

    Fused attention kernels want query, key and value heads of one width; a narrower one leaves them for a
    slower path. Precondition: none; it comes last, once the widths are settled. Postcondition: every fused
    attention has equal widths; the results are those of the unpadded program.
    """

    name = "pad_value_heads"

    def rewrite(self, program: Program, analysis: Analysis) -> Program:
        found = program.module.graph.find_nodes(op="call_function", target=_ATTENTION)
        walk = walk_of(program, analysis) if found else analysis.walk
        widths = {node.name: [_width(walk.executed[node.args[index]]) for index in (0, 2)] for node in found}
        if all(query == value for query, value in widths.values()):
            return program
        ranks = {node.name: walk.executed[node].dim() for node in found}
        program = program.copy()
        graph = program.module.graph
        for node in graph.find_nodes(op="call_function", target=_ATTENTION):
            query, value = widths[node.name]
            if query < value and node.kwargs.get("scale") is None:
                node.update_kwarg("scale", 1.0 / math.sqrt(query))  # that of the width before
            for index, width in enumerate((query, query, value)):
                if width < max(query, value):
                    padding = (node.args[index], [0, max(query, value) - width], 0.0)
                    with graph.inserting_before(node):
                        wide = graph.call_function(torch.ops.aten.constant_pad_nd.default, padding)
                    node.update_arg(index, stamp(wide, self.name, node))
            if value < query:
                with graph.inserting_after(node):
                    part = (node, ranks[node.name] - 1, 0, value)
                    cut = stamp(graph.call_function(torch.ops.aten.slice.Tensor, part), self.name, node)
                node.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)
        return program


def _width(tensor: Tensor) -> int:
    return int(tensor.shape[-1])
