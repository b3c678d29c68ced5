"""Find the coupled groups of a program. Pure: reads a program, returns groups with a reason for
each status.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import fx

from ..base._undisturbed import without_collections
from ..capturing._fx import target_name
from ..capturing._program import Program
from ..errors import ArgumentError
from ._build_groups import GroupBuilder, needed_experts
from ._coupling import Coupling
from ._depth import DEPTH, let_blocks_go
from ._grouping import CODE, ChannelSets, group_sets
from ._layout import find_blocks, torn_blocks
from ._walks import label_sets, walk_program
from .channels import Axis, Execution, Value
from .groups import EXEMPT, FROZEN
from .resources import Sparsity


@dataclass(repr=False)
class Analysis(Coupling):
    """The coupled groups of one program, and what can be asked of them."""

    @property
    def max_sparsity(self) -> float:
        """The highest sparsity that can be asked for with ``round_to=1`` (see
        :class:`fasp_fx.resources.Sparsity`).
        """
        return Sparsity(self).reach(1)

    def explain(self, first: str, second: str) -> list[str]:
        """The path of graph nodes that couples channels of two weights, from ``first`` to ``second``.

        Returns:
            One line per node of a shortest path; empty if no channel of one is coupled with a channel of the
            other.

        Raises:
            ArgumentError: a name is not a weight of the model.
        """
        return coupling_path(self, first, second)


@without_collections
def analyze_program(
    program: Program,
    split: Callable[[Program, Analysis], Program | None] | None = None,
    granularity: Iterable[str] = ("channel",),
    include: Iterable[str] = (),
) -> Analysis:
    """Analyse a captured program; if ``split`` is given, let it split fused producers that a layout ties
    together, and analyse again.
    """
    # Channel numbers are for the CPU, whatever the default device is; being told so delays every call.
    told = torch.get_default_device().type != "cpu"
    with torch.device("cpu") if told else contextlib.nullcontext():
        return _settled(program, split, granularity, include)


def _settled(
    program: Program,
    split: Callable[[Program, Analysis], Program | None] | None,
    granularity: Iterable[str],
    include: Iterable[str],
) -> Analysis:
    heads, experts, exempt = "head" in granularity, "expert" in granularity, EXEMPT in include
    execution = Execution()

    def settled(program: Program, heads: bool) -> Analysis:
        return replace(
            _analyze(program, heads, experts, exempt, execution),
            granularity=frozenset(granularity),
            include=frozenset(include),
        )

    analysis = settled(program, heads)
    while split is not None and (analysis.conflicts or exempt):
        # Rows are told apart one by one.
        rewritten = split(program, settled(program, False) if heads else analysis)
        if rewritten is None:
            break
        program, analysis = rewritten, settled(rewritten, heads)
    if DEPTH in include:
        groups = let_blocks_go(analysis.groups, analysis.labels, program, analysis.walk)
        analysis = replace(analysis, groups=groups)
    return analysis


def _analyze(program: Program, heads: bool, experts: bool, exempt: bool, execution: Execution) -> Analysis:
    numbering, walk = walk_program(program, heads, experts, execution)
    while True:
        labels = label_sets(numbering.total, walk.facts.pairs)
        labels.setflags(write=False)
        count = int(labels.max(initial=-1)) + 1
        expert = needed_experts(labels, count, walk) if experts else np.zeros(count, dtype=np.int64)
        found = ChannelSets.of(labels, expert, exempt, walk, program)
        spared = np.full(count, not exempt) & (found.status == CODE[EXEMPT])
        for slot, sets in torn_blocks(numbering, labels):
            found.freeze(sets[~spared[sets]], f"they are whole blocks of {slot}, which keep equal counts")
        group_of, keys = group_sets(found, numbering, walk)
        block, conflicts = find_blocks(
            list(walk.facts.boxes.values()),
            labels,
            np.where(found.status == CODE[FROZEN], -1, group_of),
            walk.facts.needed.values(),
        )
        uneven = [pair for conflict in conflicts for pair in walk.facts.stacks.pop(conflict.node, ())]
        if not uneven:
            break
        walk.facts.pairs += (
            uneven  # a stack whose positions cannot lose equal counts loses the same channels of all
        )
    for conflict in conflicts:
        # An exempt group is not pruned unless asked; its status says more than its layout.
        found.freeze(
            conflict.classes[~spared[conflict.classes]],
            f"equal counts cannot be kept in {conflict.node.name} = {conflict.node.target}",
        )
    if conflicts:
        group_of, keys = group_sets(found, numbering, walk)
    groups = GroupBuilder(found, block, numbering, walk, program).groups(group_of, keys)
    real = [c for c in conflicts if not spared[c.classes].all()]
    return Analysis(program, groups, real, labels, numbering, walk, experts=experts)


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
