"""Sizes that an exporter took to vary until the program said what they are: numbers, once it is known.

A node that computes one reads it of an input, which is not pruned; a number is adapted to what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ..base.compat import settled_by

#: the code of exporters and operators, where sizes are settled by what meets what
_OPERATORS = tuple(str(Path(str(file)).parent) for file in (torch.__file__, Path(__file__).parent))


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


def fixed_sizes(exported: ExportedProgram) -> Iterator[str]:
    """What a user should know of sizes of the inputs that were to vary and do not.

    Features meet weights, in an operator; where forward asks for a number, the line that does so is known. A
    first dimension is that of samples, and spoken of whatever fixed it.
    """
    inputs = set(exported.graph_signature.user_inputs)
    for node in exported.graph.find_nodes(op="placeholder"):
        shape = node.meta["val"].shape if node.name in inputs and isinstance(node.meta["val"], Tensor) else ()
        for dim, size in enumerate(shape):
            number = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
            line = None if number is None else settled_by(size)
            if line is not None and not line.filename.startswith(_OPERATORS):
                why = f"forward asks for it as a number ({Path(line.filename).name}, line {line.lineno})"
            elif number is not None and dim == 0:
                why = "it is that of what it meets"
            elif size == 1 and dim == 0:
                why = "one is a constant to an exporter"
            else:
                continue
            yield f"the size {size} of dimension {dim} of '{node.name}' is fixed, because {why}"


__all__ = ["fixed_sizes", "settled_as_numbers"]
