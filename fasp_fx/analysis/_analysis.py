"""Find the coupled groups of a program. Pure: reads a program, returns groups with a reason for
each status.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import networkx as nx
import numpy as np
import torch
from torch import fx

from ..base._undisturbed import without_collections
from ..base.compat import pytree
from ..capturing._fx import target_name
from ..capturing._program import Program
from ..errors import ArgumentError
from ._build_groups import GroupBuilder, needed_experts
from ._coupling import Coupling
from ._depth import DEPTH, let_blocks_go
from ._grouping import CODE, ChannelSets, find_blocks, group_sets, torn_blocks
from ._walks import label_sets, walk_program
from .channels import Value
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

    def settled(program: Program, heads: bool) -> Analysis:
        return replace(
            _analyze(program, heads, experts, exempt),
            granularity=frozenset(granularity),
            include=frozenset(include),
        )

    analysis = settled(program, heads)
    while split is not None and analysis.conflicts:
        # Rows are told apart one by one.
        rewritten = split(program, settled(program, False) if heads else analysis)
        if rewritten is None:
            break
        program, analysis = rewritten, settled(rewritten, heads)
    if DEPTH in include:
        groups = let_blocks_go(analysis.groups, analysis.labels, program, analysis.walk)
        analysis = replace(analysis, groups=groups)
    return analysis


def _analyze(program: Program, heads: bool, experts: bool, exempt: bool) -> Analysis:
    numbering, walk = walk_program(program, heads, experts)
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
    starts, ends = _nodes_of(analysis, first), _nodes_of(analysis, second)
    # What can be pruned says most; the channel sets of a group go the same ways.
    for group in sorted(analysis.groups, key=lambda group: CODE[group.status]):
        names = {name for member in (*group.producers, *group.consumers) for name in member.names}
        if not {first, second} <= names:
            continue
        graph = _carriers(analysis, int(group.sets[0]))
        paths = [
            nx.shortest_path(graph, start, end)
            for start in starts
            for end in ends
            if {start, end} <= graph.nodes and nx.has_path(graph, start, end)
        ]
        if paths:
            return [
                str(node.target) if node.op == "get_attr" else f"{node.name} = {node.target}"
                for node in min(paths, key=len)
            ]
    return []


def _nodes_of(analysis: Coupling, name: str) -> list[fx.Node]:
    """The nodes that give a weight of the caller's, or its parts."""
    program = analysis.program
    canonical = program.canonical()
    wanted = {canonical.get(name), *(new for new, part in program.parts.items() if part.source == name)}
    held = program.module.graph.find_nodes(op="get_attr")
    found = [node for node in held if canonical.get(target_name(node)) in wanted - {None}]
    if not found:
        raise ArgumentError(
            f"'{name}' is not a weight that the model reads; names are those of model.named_parameters()"
        )
    return found


def _carriers(analysis: Coupling, chosen: int) -> nx.Graph:
    """The nodes whose tensors hold this channel set, and those that read them."""
    graph = nx.Graph()
    for node, value in analysis.walk.values.items():
        axes = [axis for item in pytree.tree_leaves(value) if isinstance(item, Value) for axis in item.axes]
        held = [axis.numbers.reshape(-1).numpy() for axis in axes]
        if any((analysis.labels[numbers[numbers >= 0]] == chosen).any() for numbers in held):
            graph.add_edges_from((node, user) for user in node.users if user.op == "call_function")
    return graph


__all__ = ["coupling_path"]
