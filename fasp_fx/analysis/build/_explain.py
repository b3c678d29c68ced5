"""Why channels of two weights are coupled: a shortest path through the graph."""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np
from torch import fx

from .._coupling import Coupling
from ..channels import Axis, Value
from ...capturing._fx import target_name
from ...errors import ArgumentError
from ._grouping import CODE



def coupling_path(analysis: Coupling, first: str, second: str) -> list[str]:
    """The nodes that couple channels of two weights (see :meth:`fasp_fx.Analysis.explain`)."""
    starts, ends = _names_of(analysis, first), _names_of(analysis, second)
    status = {int(chosen): CODE[group.status] for group in analysis.groups for chosen in group.sets}
    shared = _sets_of(analysis, starts) & _sets_of(analysis, ends)
    canonical = analysis.program.canonical()
    for chosen in sorted(shared, key=lambda chosen: (status.get(chosen, len(CODE)), chosen)):
        # What can be pruned says most.
        graph = _carriers(analysis, chosen)
        held = {node: canonical[target_name(node)] for node in graph if node.op == "get_attr"}
        paths = [
            nx.shortest_path(graph, source, target)
            for source in held
            for target in held
            if held[source] in starts and held[target] in ends and nx.has_path(graph, source, target)
        ]
        if paths:
            return [_describe(node) for node in min(paths, key=len)]
    return []


def _names_of(analysis: Coupling, name: str) -> set[str]:
    """The names under which the analysis knows a weight of the caller's: its own, or those of its parts."""
    canonical = analysis.program.canonical()
    found = (
        {canonical[name]}
        if name in canonical
        else {new for new, part in analysis.program.parts.items() if part.source == name}
    )
    if not found:
        raise ArgumentError(
            f"'{name}' is not a weight of the model; names are those of model.named_parameters()"
        )
    return found


def _sets_of(analysis: Coupling, names: set[str]) -> set[int]:
    return {
        int(s)
        for slot in analysis.numbering.slots
        if slot.name in names
        for s in np.unique(analysis.labels[slot.base : slot.base + slot.size])
    }


def _carriers(analysis: Coupling, chosen: int) -> nx.Graph:
    """The nodes whose tensors hold this channel set, and the contractions that consume it."""
    graph = nx.Graph()
    consumers = {use.node for use in analysis.walk.facts.uses}
    holding = {
        node
        for node, value in analysis.walk.values.items()
        if any(_holds(analysis, axis, chosen) for axis in _axes(value))
    }
    for node in analysis.walk.values:
        for source in node.all_input_nodes:
            if source in holding and (node in holding or node in consumers or node.op == "call_function"):
                graph.add_edge(source, node)
    return graph


def _holds(analysis: Coupling, axis: Axis, chosen: int) -> bool:
    numbers = axis.numbers.reshape(-1).numpy()
    return bool((analysis.labels[numbers[numbers >= 0]] == chosen).any())


def _axes(value: Any) -> list[Axis]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [axis for item in values if isinstance(item, Value) for axis in item.axes]


def _describe(node: fx.Node) -> str:
    return f"{node.target}" if node.op == "get_attr" else f"{node.name} = {node.target}"


__all__ = ["coupling_path"]
