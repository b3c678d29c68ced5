"""The diagram of one layer: the weights that produce a group left of it, those that consume it right of it,
and what is not joined one below the other.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import networkx as nx

from ...pruning.report import Line


@dataclass
class Node:
    """A weight with its bias and the like; in a diagram of equal parts, all that stand at its place."""

    label: str
    parameters: list[str]
    consumes: list[int]
    produces: list[int]
    x: int = 0
    y: float = 0.0


@dataclass
class Hub:
    """The groups at one place: one, or those of equal parts such as experts."""

    groups: list[int]
    x: int = 1
    y: float = 0.0


@dataclass
class Layer:
    """The diagram of one layer: ``edges`` lead from a node to a hub (``[node, hub, 0]``) or on to a node
    (``[node, hub, 1]``).

    ``x`` are columns (even: weights, odd: groups), ``y`` are lines of text from the top. ``consumes`` and
    ``produces`` of a node name only shared groups, which have lanes; its own groups are edges.
    """

    label: str
    nodes: list[Node] = field(default_factory=list)
    hubs: list[Hub] = field(default_factory=list)
    edges: list[tuple[int, int, int]] = field(default_factory=list)
    columns: int = 1
    height: float = 1.0


class Weight(NamedTuple):
    """A node before it has a place: parameters of one module with the groups that they consume
    and produce.
    """

    label: str
    parameters: tuple[str, ...]
    consumes: frozenset[int]
    produces: frozenset[int]


def star(name: str) -> str:
    """A name without its numbers: ``model.layers.*.mlp.up_proj.weight``."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _edges(weights: Sequence[Weight], shared: set[int]) -> tuple[nx.DiGraph, list[tuple[Any, Any]]]:
    """A layer's own groups as a graph without circles, and the edges back that would close one (a gate that a
    group feeds and that scales it, say).
    """
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from((0, index) for index in range(len(weights)))
    back = []
    touched: dict[int, list[int]] = defaultdict(list)
    for index, weight in enumerate(weights):
        for group in sorted((weight.consumes | weight.produces) - shared):
            touched[group].append(index)
    for group, indices in sorted(touched.items(), key=lambda item: (len(item[1]), item[0])):
        graph.add_edges_from(
            ((0, index), (1, group)) for index in indices if group in weights[index].produces
        )
        for index in indices:
            if group in weights[index].consumes:
                edge = (1, group), (0, index)
                if graph.has_node(edge[0]) and nx.has_path(graph, edge[1], edge[0]):
                    back.append(edge)
                else:
                    graph.add_edge(*edge)
    return graph, back


def diagram(name: str, weights: Sequence[Weight], shared: set[int], lines: Sequence[Line]) -> Layer:
    """Place the parts of a layer below one another: first what feeds streams alone, then groups in order,
    then what only joins a stream.
    """
    graph, back = _edges(weights, shared)
    parts = [sorted(part) for part in nx.weakly_connected_components(graph)]

    def place(part: list[Any]) -> tuple[int, int]:
        groups = [index for kind, index in part if kind]
        return (1, min(groups)) if groups else (0 if weights[part[0][1]].consumes else 2, part[0][1])

    layer = Layer(name)
    alike: dict[Hashable, Sequence[Node | Hub]] = {}
    top = 0.0
    for part in sorted(parts, key=place):
        where = {vertex: index for index, vertex in enumerate(part)}
        edges = sorted((where[a], where[b]) for a, b in (*graph.subgraph(part).edges, *back) if a in where)
        looks = (tuple(_vertex_look(vertex, weights, shared, lines) for vertex in part), tuple(edges))
        if edges and looks in alike:
            _join(alike[looks], part, weights)
            continue
        places = _places(graph.subgraph(part))
        items: list[Node | Hub] = [_item(vertex, name, weights, shared) for vertex in part]
        for item, vertex in zip(items, part):
            item.x, item.y = places[vertex][0], top + places[vertex][1]
        alike[looks] = items
        numbers = []
        for item in items:
            held: list[Any] = layer.nodes if isinstance(item, Node) else layer.hubs
            numbers.append(len(held))
            held.append(item)
        layer.edges += [
            (numbers[b], numbers[a], 1) if part[a][0] else (numbers[a], numbers[b], 0) for a, b in edges
        ]
        top += max(y for _, y in places.values()) + 1
    layer.edges.sort()
    layer.height = top
    layer.columns = max((item.x + 1 for placed in (layer.nodes, layer.hubs) for item in placed), default=1)
    return layer


def _item(vertex: Any, layer: str, weights: Sequence[Weight], shared: set[int]) -> Node | Hub:
    kind, index = vertex
    if kind:
        return Hub([index])
    weight = weights[index]
    label = (
        weight.label.rpartition(".")[2] if weight.label == layer else weight.label.removeprefix(f"{layer}.")
    )
    return Node(
        label, list(weight.parameters), sorted(weight.consumes & shared), sorted(weight.produces & shared)
    )


def _vertex_look(vertex: Any, weights: Sequence[Weight], shared: set[int], lines: Sequence[Line]) -> Hashable:
    kind, index = vertex
    return (
        look(lines[index])
        if kind
        else (star(weights[index].label), weights[index].consumes & shared, weights[index].produces & shared)
    )


def _join(made: Sequence[Node | Hub], part: list[Any], weights: Sequence[Weight]) -> None:
    """Let an equal part share the place of the first."""
    for item, (_, index) in zip(made, part):
        if isinstance(item, Hub):
            item.groups.append(index)
        else:
            item.parameters += weights[index].parameters
            item.label = star(item.label)


def _places(graph: nx.DiGraph) -> dict[Any, tuple[int, float]]:
    """Column and height of each vertex: columns by the longest path, heights near the vertices it is joined
    to, one line apart at least.
    """
    column: dict[Any, int] = {}
    for vertex in nx.lexicographical_topological_sort(graph):
        column[vertex] = max((column[before] + 1 for before in graph.predecessors(vertex)), default=vertex[0])
    for vertex in reversed(list(nx.topological_sort(graph))):
        if not graph.in_degree(vertex) and graph.out_degree(vertex):  # a source stands next to what it feeds
            column[vertex] = min(column[after] for after in graph.successors(vertex)) - 1
    columns = [sorted(v for v in graph if column[v] == x) for x in range(max(column.values()) + 1)]
    height = {vertex: float(y) for vertices in columns for y, vertex in enumerate(vertices)}
    for order in (columns, columns[::-1], columns):
        for vertices in order:
            wanted = {
                v: _mean([height[other] for other in nx.all_neighbors(graph, v)], height[v]) for v in vertices
            }
            below = None
            ranked = sorted(vertices, key=lambda v: (wanted[v], v))
            for vertex in ranked:
                height[vertex] = wanted[vertex] if below is None else max(wanted[vertex], below + 1)
                below = height[vertex]
            shift = _mean([height[v] - wanted[v] for v in ranked], 0.0)
            for vertex in ranked:
                height[vertex] -= shift
    lowest = min(height.values())
    return {vertex: (column[vertex], round(height[vertex] - lowest, 3)) for vertex in graph}


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def look(line: Line) -> Hashable:
    return line.status, re.sub(r"\d+", "*", line.reason), line.before, line.blocks


__all__ = ["Hub", "Layer", "Node", "Weight", "diagram", "look", "star"]
