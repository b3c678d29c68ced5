"""Windows of a graph: stretches between two places that a single changed value crosses, each with a
non-linearity inside.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from ...analysis._analysis import Analysis
from ...analysis.groups import Group
from ...capturing._fx import target_name


@dataclass(frozen=True)
class Window:
    """A stretch of a graph, from the node numbered ``start`` to before the one numbered ``stop``.

    Attributes:
        output: the only value behind it that what was removed changes.
        weights: canonical names of the parameters that only this stretch reads.
    """

    start: int
    stop: int
    output: fx.Node
    weights: tuple[str, ...]


def find_windows(analysis: Analysis, groups: Collection[Group]) -> list[Window]:
    """The smallest windows, in graph order, in which groups lose channels.

    A window ends where one changed value is alone alive, its last weight has been read behind another weight,
    and a weight has lost columns in it. What is left behind the last belongs to it.

    Args:
        groups: those that lose channels.
    """
    nodes = list(analysis.program.module.graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    losing = {place[use.node] for group in groups for use in group.uses}
    contracting = {place[use.node] for use in analysis.walk.facts.uses}
    changed = _changed(analysis, groups, nodes)
    if not changed or not losing:
        return []
    spans: list[tuple[int, int, fx.Node]] = []
    start = min(map(place.__getitem__, changed))
    for index, output in _cuts(nodes, place, changed):
        inside = range(start, index + 1)
        if len(contracting & set(inside)) > 1 and losing & set(inside):
            spans.append((start, index + 1, output))
            start = index + 1
        last = index + 1, output
    if losing & set(range(start, len(nodes))) and spans:  # too little for a window of its own
        spans[-1] = (spans[-1][0], *last)
    return [Window(*span, _weights(analysis, nodes, *span)) for span in spans]


def _changed(analysis: Analysis, groups: Collection[Group], nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes whose values depend on the inputs and on a weight of the groups."""
    canonical = analysis.program.canonical()
    touched = {member.name for group in groups for member in (*group.producers, *group.consumers)}
    of_inputs: set[fx.Node] = set()
    of_weights: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(argument in of_inputs for argument in node.all_input_nodes):
            of_inputs.add(node)
        is_touched = node.op == "get_attr" and canonical.get(target_name(node), target_name(node)) in touched
        if is_touched or any(argument in of_weights for argument in node.all_input_nodes):
            of_weights.add(node)
    return {node for node in of_inputs & of_weights if node.op == "call_function"}


def _cuts(
    nodes: list[fx.Node], place: dict[fx.Node, int], changed: set[fx.Node]
) -> Iterator[tuple[int, fx.Node]]:
    """Where a single changed value is alive, a tensor of real numbers: the position of the node before, and
    the value.
    """
    last = {node: max((place[user] for user in node.users), default=place[node]) for node in changed}
    alive: set[fx.Node] = set()
    for index, node in enumerate(nodes):
        if node.op == "output":
            return
        alive = {other for other in alive if last[other] > index}
        if node in changed and last[node] > index:
            alive.add(node)
        if len(alive) == 1:
            (output,) = alive
            value = output.meta.get("val")
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
                yield index, output


def _weights(
    analysis: Analysis, nodes: list[fx.Node], start: int, stop: int, output: fx.Node
) -> tuple[str, ...]:
    """The parameters that say something of the output, and of nothing behind the window but by way of it."""
    program = analysis.program
    canonical, parameters = program.canonical(), dict(program.module.named_parameters(remove_duplicate=False))
    inside = set(nodes[start:stop])
    found: dict[str, bool] = {}
    for node in nodes:
        if node.op == "get_attr" and node.users:
            name = canonical.get(target_name(node), target_name(node))
            found[name] = found.get(name, True) and _reached(node, output) <= inside
    return tuple(
        name
        for name, is_inside in found.items()
        if is_inside and name in parameters and parameters[name].is_floating_point()
    )


def _reached(node: fx.Node, output: fx.Node) -> set[fx.Node]:
    """All that is computed from a node, but for what is computed from the output alone."""
    found: set[fx.Node] = set()
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if user not in found:
            found.add(user)
            waiting += [] if user is output else list(user.users)
    return found


__all__ = ["Window", "find_windows"]
