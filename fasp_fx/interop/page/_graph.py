"""The graph of coupled groups as rows and columns: a row for each layer, read from left to right, streams
that run through many rows at both sides.

A layer is what stands under the first number of a name: ``model.layers.3`` of
``model.layers.3.mlp.up_proj.weight``. Within a row the weights that produce a group stand left of it and
those that consume it right of it. A group with weights in several rows (a residual stream, say) is *shared*:
it runs down a lane at the left of the rows that consume it and down a lane at the right of those that produce
it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from ...analysis.groups import ranges
from ...pruning.report import Line
from ._layer import Layer, Weight, diagram, look, star


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


__all__ = ["Graph", "Row", "Shared", "lay_out", "layer_of"]
