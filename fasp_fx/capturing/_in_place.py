"""Operators that write into a tensor that the graph has just made, as the operators that return the result.

Functionalising a graph traces it once more. Most writes in models are of this simple kind (``position +=
offset``), and need no trace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ..base._tolerable import tolerable
from ..base.compat import FakeTensor, OpOverload, is_composite
from ._dead import remove_dropouts

_DETACH, _DETACHED = torch.ops.aten.detach_.default, torch.ops.aten.detach.default


def out_of_place(exported: ExportedProgram) -> ExportedProgram:
    """Rewrite such writes in the program's own graph, which nobody else may hold."""
    if not any(map(_writes, exported.graph.nodes)):
        return exported
    changed = remove_dropouts(exported.graph)
    order = {node: index for index, node in enumerate(exported.graph.nodes)}
    for node in exported.graph.nodes:
        if not _writes(node):
            continue
        if node.target == _DETACH:
            node.target = _DETACHED
            changed = True
            continue
        twin = _twin(node)
        if (
            twin is None
            or not node.args
            or not _is_unshared(node.args[0], node)
            or not _keeps_type(node, twin)
        ):
            continue
        written: Any = node.args[0]
        node.target = twin
        written.replace_all_uses_with(
            node, delete_user_cb=lambda user, after=order[node]: order[user] > after
        )
        changed = True
    if changed:
        exported.graph_module.recompile()
    return exported


def _writes(node: fx.Node) -> bool:
    return (
        node.op == "call_function" and isinstance(node.target, OpOverload) and node.target._schema.is_mutable
    )


def _twin(node: fx.Node) -> OpOverload | None:
    """The operator that returns what this one writes into its first argument, and takes the same
    arguments.
    """
    target: Any = node.target
    schema = target._schema
    writes = [
        argument
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    packet = getattr(getattr(torch.ops, target.namespace), target._opname.removesuffix("_"), None)
    if (
        len(writes) != 1
        or writes[0] is not schema.arguments[0]
        or not target._opname.endswith("_")
        or packet is None
    ):
        return None
    twin = getattr(packet, target._overloadname, None)
    if not isinstance(twin, OpOverload) or _returns_alias(twin) or twin._schema.is_mutable:
        return None
    same = [argument.name for argument in twin._schema.arguments] == [
        argument.name for argument in schema.arguments
    ]
    return twin if same else None


def _is_unshared(written: Any, by: fx.Node) -> bool:
    """Whether a tensor was made by the graph, and nothing but its own node speaks of its storage."""
    if (
        not isinstance(written, fx.Node)
        or written.op != "call_function"
        or not isinstance(written.target, OpOverload)
    ):
        return False
    if (
        _returns_alias(written.target)
        or written.target._schema.is_mutable
        or not isinstance(written.meta.get("val"), Tensor)
    ):
        return False
    return not any(_shares(user) for user in written.users if user is not by)


def _shares(user: fx.Node) -> bool:
    """Whether what a node makes may be a view of what it takes, or the node writes into that."""
    if user.op == "output":
        return False
    return (
        not isinstance(user.target, OpOverload)
        or _returns_alias(user.target)
        or user.target._schema.is_mutable
    )


def _returns_alias(operator: OpOverload) -> bool:
    """Whether an operator may return a view of an argument; one that is made of others need not say so."""
    composite = is_composite(operator)
    return composite or any(result.alias_info is not None for result in operator._schema.returns)


def _keeps_type(node: fx.Node, twin: OpOverload) -> bool:
    """Whether an operator returns the type of what the one in its place writes into, as far as that can be
    told.
    """
    recorded = node.meta.get("val")
    if not isinstance(recorded, FakeTensor):
        return False
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda argument: argument.meta.get("val"))
    try:
        with recorded.fake_mode, torch.no_grad():
            made = twin(*args, **kwargs)
    except tolerable(Exception):
        return False  # an operator raises what it likes; the write stays one, and the graph is traced again
    return isinstance(made, Tensor) and made.dtype == recorded.dtype


__all__ = ["out_of_place"]
