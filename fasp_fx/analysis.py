"""Find the coupled groups of a program. Pure: reads a program, returns groups with a reason for
each status.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import torch

from ._analysis._build_groups import GroupBuilder
from ._analysis._depth import DEPTH, let_blocks_go
from ._analysis._experts import needed_experts
from ._analysis._explain import coupling_path
from ._analysis._grouping import CODE, ChannelSets, group_sets
from ._analysis._layout import Conflict, find_blocks, torn_blocks
from ._analysis._walks import label_sets, walk_program
from ._program import Program
from ._undisturbed import without_collections
from .channels import Execution, Numbering, Walk
from .groups import EXEMPT, FROZEN, PRUNABLE, Group


@dataclass
class Analysis:
    """The coupled groups of one program.

    Attributes:
        program: the captured program, with fused producers split where a layout demanded it.
        groups: all groups, in graph order.
        conflicts: tensors whose layout stands in the way (their groups are frozen with reason ``layout``).
        labels: the channel set of each channel number.
        granularity, include: as for :func:`fasp_fx.prune`.
        known: how many of the channel numbers are those of ``program``, where a pass has brought weights with
            numbers of their own; ``None``: all.
        experts: whether the numbers by which routers name experts were followed.
    """

    program: Program
    groups: list[Group]
    conflicts: list[Conflict]
    labels: np.ndarray
    numbering: Numbering
    walk: Walk
    granularity: frozenset[str] = frozenset({"channel"})
    include: frozenset[str] = frozenset()
    known: int | None = None
    experts: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Analysis:
        """The same with lists of its own; program and walk, which nothing changes, are shared."""
        return replace(
            self, groups=list(self.groups), conflicts=list(self.conflicts), labels=self.labels.copy()
        )

    def __repr__(self) -> str:
        counts = Counter(group.status for group in self.groups)
        return (
            f"Analysis({', '.join(f'{count} {status}' for status, count in counts.items()) or 'no groups'})"
        )

    def fresh(self) -> np.ndarray:
        """The channel sets that only weights brought by a pass have."""
        return (
            np.setdiff1d(self.labels[self.known :], self.labels[: self.known])
            if self.known is not None
            else np.zeros(0, dtype=np.int64)
        )

    @property
    def chosen(self) -> list[Group]:
        """The groups that are pruned: prunable ones and those asked for, at the granularities asked for."""
        return [
            group
            for group in self.groups
            if (group.status == PRUNABLE or group.status in self.include)
            and group.granularity in self.granularity
        ]

    def select(self, status: str) -> list[Group]:
        """The groups of one status."""
        return [group for group in self.groups if group.status == status]

    @property
    def max_sparsity(self) -> float:
        """The highest sparsity that can be asked for with ``round_to=1`` (see
        :class:`fasp_fx.resources.Sparsity`).
        """
        from .resources import Sparsity

        return Sparsity(self).reach(1)

    @cached_property
    def without_rule(self) -> dict[str, int]:
        """Operators that had no rule and froze what they touched, with the number of times each stands in the
        graph.
        """
        return {name: len(nodes) for name, nodes in sorted(self.walk.without_rule.items())}

    def graph(self) -> nx.DiGraph:
        """Weights and groups as a directed graph: producer → group → consumer; nodes carry ``kind`` and
        ``status``.
        """
        graph = nx.DiGraph()
        for group in self.groups:
            vertex = ("group", group.name)
            graph.add_node(vertex, kind="group", status=group.status, size=group.size, reason=group.reason)
            for member in group.producers:
                graph.add_node(("weight", member.name), kind="weight")
                graph.add_edge(("weight", member.name), vertex, dim=member.dim)
            for member in group.consumers:
                graph.add_node(("weight", member.name), kind="weight")
                graph.add_edge(vertex, ("weight", member.name), dim=member.dim)
        return graph

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
