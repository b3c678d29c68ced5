"""Operators that are given graphs: which positions the graphs are told, and whether anything
depends on that.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fasp_fx.patterns import ORDINALS, Rule, lookup

from ...base.compat import pytree
from ...capturing._fx import arguments
from ._value import Value


def told(rule: Rule, given: dict[str, Any], target: object) -> dict[str, str]:
    """The letters along which a call tells positions apart, each with the reason why none of them can go.

    A graph is told the number of a position; with another position gone it would be told another number. Only
    where nothing that it gives depends on that number, and no table beside it has an entry for each position,
    are all positions alike.
    """
    found: dict[str, str] = {}
    for letter, name, ordinal in (clause.words for clause in rule.all("told")):
        why = _tells_apart(given.get(name), ORDINALS[ordinal])
        if why is not None:
            found.setdefault(letter, f"'{name}' of {target} {why}")
    return found


def _tells_apart(given: Any, place: int) -> str | None:
    parts = given if isinstance(given, (list, tuple)) else [given]
    if any(isinstance(part, Value) and len(part.shape) > place and part.shape[place] > 1 for part in parts):
        return "has an entry for each position along this dimension"
    graphs = [part for part in parts if isinstance(part, fx.GraphModule)]
    if not graphs:
        return "is no graph that could be read, so that it may tell positions along this dimension apart"
    if any(_depends(graph.graph, place) for graph in graphs):
        return "tells positions along this dimension apart"
    return None


def _depends(graph: fx.Graph, place: int) -> bool:
    """Whether anything that a graph gives, or any write of its, depends on the value of an input."""
    reached = {graph.find_nodes(op="placeholder")[place]}
    for node in graph.nodes:  # in topological order
        if not reached.isdisjoint(_values_read(node)):
            if node.op == "output" or node.is_impure():
                return True
            reached.add(node)
    return False


def _values_read(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a node's result can depend on; of a tensor that one is made like
    (``new_zeros``), only type and device are read.
    """
    rule = lookup(node.target)
    if rule is None or not rule.creates:
        return node.all_input_nodes
    others = [value for name, value in arguments(node).items() if name != "self"]
    return [leaf for leaf in pytree.tree_leaves(others) if isinstance(leaf, fx.Node)]
