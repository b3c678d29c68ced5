"""What the analysis finds of one program: which channels go together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import networkx as nx
import numpy as np

from ..capturing._program import Program
from ._layout import Conflict
from .channels import Numbering, Walk
from .groups import PRUNABLE, Group


@dataclass
class Coupling:
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
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


__all__ = ["Coupling"]
