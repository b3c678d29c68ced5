"""Sizes that an exporter took to vary until the program said what they are: numbers, once it is known.

A node that computes one reads it of an input, which is not pruned; a number is adapted to what is left.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram


def settled_as_numbers(exported: ExportedProgram) -> ExportedProgram:
    """Write such sizes as the numbers that they are, in the program's own graph, which nobody else may hold;
    those that the program returns stay.
    """
    found = {node: number for node in exported.graph.nodes if (number := _number(node)) is not None}
    for user in exported.graph.nodes:
        if user.op != "output" and not found.keys().isdisjoint(user.all_input_nodes):
            user.args, user.kwargs = fx.map_arg(
                (user.args, user.kwargs), lambda given: found.get(given, given)
            )
    for node in reversed(found):
        if not node.users:
            exported.graph.erase_node(node)
    if found:
        exported.graph_module.recompile()
    return exported


def _number(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.SymInt):
        return None
    number: int | None = value.node.maybe_as_int()
    return number


__all__ = ["settled_as_numbers"]
