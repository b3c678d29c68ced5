"""Tuples among the arguments of higher-order operators, in a form that torch's serialiser can write.

It writes lists of one kind and dicts of any kind. A tuple of sizes, tensors, graphs and nothing, such as the
block mask of flex attention, is therefore written as a dict with the keys ``"0"``, ``"1"`` …, and made a
tuple again on reading.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ..base.compat import HigherOrderOperator
from ..capturing._fx import arguments
from ..capturing._program import copy_graph
from ..errors import StoreError

#: the arguments that are tuples, by operator
_TUPLES: dict[HigherOrderOperator, tuple[str, ...]] = {
    torch.ops.higher_order.flex_attention: (
        "block_mask",
        "score_mod_other_buffers",
        "mask_mod_other_buffers",
    ),
}


def without_tuples(program: ExportedProgram) -> ExportedProgram:
    """The same program with dicts in the place of those tuples, for writing only; the same object if it has
    none. Tensors are shared.
    """
    if not any(node.target in _TUPLES for node in program.graph.nodes):
        return program
    module = fx.GraphModule(program.graph_module, copy_graph(program.graph))
    module.meta.update(program.graph_module.meta)
    _replace(module.graph, lambda node, name, value: {str(index): item for index, item in enumerate(value)})
    return program._update(module, program.graph_signature)


def with_tuples(program: ExportedProgram) -> None:
    """Make tuples again of what :func:`without_tuples` wrote; changes the program.

    Raises:
        StoreError: an argument is nothing that it wrote.
    """
    if _replace(program.graph, _read):
        program.graph_module.recompile()


def _read(node: fx.Node, name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, dict) or list(value) != [str(index) for index in range(len(value))]:
        raise StoreError(
            f"argument '{name}' of node '{node.name}' ({node.target}) is no tuple as save() writes it; save"
            " the result again"
        )
    return tuple(value.values())


def _replace(graph: fx.Graph, change: Callable[[fx.Node, str, Any], Any]) -> bool:
    found = False
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _TUPLES:
            given = arguments(node)
            node.args, node.kwargs = (
                tuple(
                    change(node, name, value) if name in _TUPLES[node.target] else value
                    for name, value in given.items()
                ),
                {},
            )
            found = True
    return found


__all__ = ["with_tuples", "without_tuples"]
