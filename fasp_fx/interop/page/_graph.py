"""The graph of coupled groups as rows and columns: a row for each layer, read from left to right, streams
that run through many rows at both sides.

A layer is what stands under the first number of a name: ``model.layers.3`` of
``model.layers.3.mlp.up_proj.weight``. Within a row the weights that produce a group stand left of it and
those that consume it right of it. A group with weights in several rows (a residual stream, say) is *shared*:
it runs down a lane at the left of the rows that consume it and down a lane at the right of those that produce
it. What is not joined stands one below the other.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import networkx as nx

from ...analysis.groups import ranges
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


@dataclass
class Row:
    """Layers that look alike, shown as one until it is opened."""

    label: str
    layers: list[Layer]


@dataclass
class Shared:
    """A group that runs through several rows: its lanes at the left and right (``None`` where nobody consumes
    or produces it).
    """

    group: int
    tag: str
    left: int | None = None
    right: int | None = None


@dataclass
class Graph:
    """Rows from top to bottom, and the lanes beside them."""

    rows: list[Row]
    shared: list[Shared]
    left: int = 0
    right: int = 0


def layer_of(name: str) -> str:
    """The path up to the first number among its parts, or nothing."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    return "" if first is None else ".".join(parts[: first + 1])


def lay_out(lines: Sequence[Line]) -> Graph:
    """Find the rows of groups and weights, and a place for each."""
    layers = _by_layer(_weights(lines))
    touching: dict[int, set[str]] = defaultdict(set)
    for name, weights in layers.items():
        for group in frozenset().union(*(weight.consumes | weight.produces for weight in weights)):
            touching[group].add(name)
    shared = {group for group, names in touching.items() if len(names) > 1}
    rows: dict[Hashable, Row] = {}
    for name, weights in layers.items():
        layer = diagram(name, weights, shared, lines)
        key = (star(name) if layer_of(f"{name}.") else name, _looks(layer, lines))
        rows.setdefault(key, Row("", [])).layers.append(layer)
    for row in rows.values():
        row.label = _span([layer.label for layer in row.layers])
    return _lanes(list(rows.values()), sorted(shared))


def _weights(lines: Sequence[Line]) -> list[Weight]:
    """All weights; a parameter goes with another of its module if it touches no group that the other does not
    touch alike.
    """
    consumes: dict[str, set[int]] = defaultdict(set)
    produces: dict[str, set[int]] = defaultdict(set)
    modules: dict[str, dict[str, None]] = defaultdict(dict)
    for index, line in enumerate(lines):
        for members, roles in ((line.producers, produces), (line.consumers, consumes)):
            for name, _ in members:
                roles[name].add(index)
                modules[name.rpartition(".")[0]][name] = None
    found = []
    for module, names in modules.items():
        leaders: dict[str, list[str]] = {}
        for name in sorted(names, key=lambda name: -len(consumes[name]) - len(produces[name])):
            # Sorting is stable.
            leader = next(
                (
                    other
                    for other in leaders
                    if consumes[name] <= consumes[other] and produces[name] <= produces[other]
                ),
                name,
            )
            leaders.setdefault(leader, []).append(name)
        for leader, parameters in leaders.items():
            label = module if len(leaders) == 1 and module else leader
            found.append(
                Weight(label, tuple(parameters), frozenset(consumes[leader]), frozenset(produces[leader]))
            )
    return found


def _by_layer(weights: Iterable[Weight]) -> dict[str, list[Weight]]:
    """Weights by layer; those outside of any stand between the layers as they were met, and numbered layers
    by their number.
    """
    found: dict[str, list[Weight]] = {}
    for weight in weights:
        found.setdefault(layer_of(weight.parameters[0]) or weight.label, []).append(weight)
    places: dict[str, int] = {}
    for name in found:
        places.setdefault(star(name), len(places))
    return {
        name: found[name]
        for name in sorted(
            found,
            key=lambda name: (
                places[star(name)],
                [int(part) for part in name.split(".") if part.isdecimal()],
            ),
        )
    }


def _looks(layer: Layer, lines: Sequence[Line]) -> Hashable:
    """What must be equal for two layers to be shown as one: everything but their numbers and what was
    removed.
    """
    nodes = tuple(
        (star(node.label), len(node.parameters), tuple(node.consumes), tuple(node.produces))
        for node in layer.nodes
    )
    hubs = tuple(tuple(look(lines[group]) for group in hub.groups) for hub in layer.hubs)
    return nodes, hubs, tuple(layer.edges)


def _span(labels: Sequence[str]) -> str:
    """One label for layers that differ in their number: ``model.layers.0-29``."""
    if len(labels) == 1:
        return labels[0]
    stem = labels[0].rpartition(".")[0]
    numbers = ranges(tuple(int(label.rpartition(".")[2]) for label in labels))
    return f"{stem}.{numbers}" if stem else numbers


def _lanes(rows: list[Row], shared: Sequence[int]) -> Graph:
    """Give each shared group a lane at each side where it is joined; groups that no row has in common share a
    lane.
    """
    graph = Graph(rows, [Shared(group, f"S{number}") for number, group in enumerate(shared, 1)])
    for side, role in (("left", "consumes"), ("right", "produces")):
        joined = [
            {group for layer in row.layers for node in layer.nodes for group in getattr(node, role)}
            for row in rows
        ]
        ends: list[int] = []
        spans = []
        for item in graph.shared:
            at = [index for index, groups in enumerate(joined) if item.group in groups]
            if at:
                spans.append((at[0], at[-1], item))
        for first, last, item in sorted(spans, key=lambda span: (span[0], -span[1])):
            lane = next((lane for lane, end in enumerate(ends) if end < first), len(ends))
            ends[lane : lane + 1] = [last]
            setattr(item, side, lane)
        setattr(graph, side, len(ends))
    return graph
