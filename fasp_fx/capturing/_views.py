"""Composite operators without a rule that are one view, written as that.

Taking composites apart traces a graph once more, and models call this one often.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ._fx import arguments

_ATEN = torch.ops.aten


def as_views(exported: ExportedProgram) -> ExportedProgram:
    """Rewrite such calls in the program's own graph, which nobody else may hold."""
    if not exported.graph.find_nodes(op="call_function", target=_UNFLATTEN):
        return exported
    #: what makes the sizes that vary, of those nodes that were passed
    sizes: dict[Any, fx.Node | tuple[fx.Node, int]] = {}
    for node in exported.graph.nodes:
        if node.target == _UNFLATTEN:
            _as_view(node, sizes)
        _note(node, sizes)
    exported.graph_module.recompile()
    return exported


_UNFLATTEN = _ATEN.unflatten.int


def _note(node: fx.Node, sizes: dict[Any, fx.Node | tuple[fx.Node, int]]) -> None:
    """Note the sizes that a node makes; one of an input, which is looked up, gives way to a node."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        if isinstance(sizes.get(value.node.expr), (tuple, type(None))):
            sizes[value.node.expr] = node
    elif node.op == "placeholder" and isinstance(value, Tensor):
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                sizes.setdefault(size.node.expr, (node, dim))


def _as_view(node: fx.Node, sizes: dict[Any, fx.Node | tuple[fx.Node, int]]) -> None:
    """Let a call of ``unflatten`` be one of ``view``, where the sizes of the other dimensions are known.

    They are looked up where an exporter does, not of the tensor itself, of which they would be one more use.
    """
    given = arguments(node)
    source, parts = given["self"], list(given["sizes"])
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return
    dim = given["dim"] % before.dim()
    others = [size for other, size in enumerate(before.shape) if other != dim]
    if not all(isinstance(size, int) or size.node.expr in sizes for size in others):
        return
    parts = [
        made if isinstance(part, int) and isinstance(made, int) else part
        for part, made in zip(parts, after.shape[dim:])
    ]
    with node.graph.inserting_before(node):
        made = [_made(size, sizes) for size in others]
    node.target = _ATEN.view.default
    node.args, node.kwargs = (source, [*made[:dim], *parts, *made[dim:]]), {}


def _made(size: Any, sizes: dict[Any, fx.Node | tuple[fx.Node, int]]) -> Any:
    """A size as an argument."""
    if isinstance(size, int):
        return size
    found = sizes[size.node.expr]
    if isinstance(found, tuple):
        source, dim = found
        found = sizes[size.node.expr] = source.graph.call_function(_ATEN.sym_size.int, (source, dim))
        found.meta = {"val": size}
    return found


__all__ = ["as_views"]
