"""Keep attention exact and fast once its heads have changed width."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, fx

from fasp_fx.analysis import Analysis, Walk
from fasp_fx.capturing import Program, stamp

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def pin_attention_scale(originals: Mapping[fx.Node, fx.Node], walk: Walk) -> None:
    """Write out attention's implicit scale, 1/√(head width), before the width changes.

    Args:
        originals: of the nodes of a copy, those of the program that was walked.
    """
    for node, original in originals.items():
        if node.target is _ATTENTION and node.kwargs.get("scale") is None:
            width = _width(walk.executed[original.args[0]])  # type: ignore[index]
            node.update_kwarg("scale", 1.0 / math.sqrt(width))
            stamp(node, "pin_attention_scale")


def pad_value_heads(program: Program, analysis: Analysis, walk: Walk, gone: np.ndarray) -> Program:
    """Pad value heads with zeros to the width of the query heads, and slice the result; or query and key
    heads to that of the value heads.

    Fused attention kernels want query, key and value heads of one width; a narrower one leaves them for a
    slower path. Scales are written out by now.
    """
    nodes = program.module.graph.find_nodes(op="call_function", target=_ATTENTION)
    widths = [[_width(walk.executed[node.args[index]]) for index in range(3)] for node in nodes]
    if all(len(set(each)) == 1 for each in widths):
        return program
    ranks = [walk.executed[node].dim() for node in nodes]
    program = program.copy()
    graph = program.module.graph
    copies = graph.find_nodes(op="call_function", target=_ATTENTION)
    for node, each, rank in zip(copies, widths, ranks, strict=True):
        for index, width in enumerate(each):
            if width < max(each):
                padding = (node.args[index], [0, max(each) - width], 0.0)
                with graph.inserting_before(node):
                    wide = graph.call_function(torch.ops.aten.constant_pad_nd.default, padding)
                node.update_arg(index, stamp(wide, "pad_value_heads", node))
        value = each[2]
        if value < max(each):
            with graph.inserting_after(node):
                part = (node, rank - 1, 0, value)
                cut = stamp(graph.call_function(torch.ops.aten.slice.Tensor, part), "pad_value_heads", node)
            node.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)
    return program


def _width(tensor: Tensor) -> int:
    return int(tensor.shape[-1])
