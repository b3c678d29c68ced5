"""Padding by an amount that varies, which may be none.

Where there is nothing to pad, a kernel returns what lies in memory as its input does. A tracer takes the
result to lie in order at every size, and settles by that which changes of shape are views.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram

from ._fx import arguments

_ATEN = torch.ops.aten
_PADS = (_ATEN.pad.default, _ATEN.constant_pad_nd.default)
_COPY, _IN_ORDER = _ATEN.clone.default, {"memory_format": torch.contiguous_format}


def padded_in_order(exported: ExportedProgram) -> ExportedProgram:
    """Let what such calls return lie in order, in the program's own graph, which nobody else may hold."""
    found = [
        node
        for operator in _PADS
        for node in exported.graph.find_nodes(op="call_function", target=operator)
        if _varies(node) and not all(map(_is_in_order, node.users))
    ]
    for node in found:
        _put_in_order(node)
    if found:
        exported.graph_module.recompile()
    return exported


def _varies(node: fx.Node) -> bool:
    return any(isinstance(amount, fx.Node) for amount in arguments(node)["pad"])


def _is_in_order(node: fx.Node) -> bool:
    return node.target == _COPY and node.kwargs == _IN_ORDER


def _put_in_order(node: fx.Node) -> None:
    with node.graph.inserting_after(node):
        copy = node.graph.call_function(_COPY, (node,), dict(_IN_ORDER))
    copy.meta = dict(node.meta)
    # the program names its outputs
    node.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy and user.op != "output")
    if len(copy.users) == 0:
        node.graph.erase_node(copy)


__all__ = ["padded_in_order"]
