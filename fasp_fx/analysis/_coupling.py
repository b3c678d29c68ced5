"""What the analysis finds of one program: which channels go together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from ..capturing._program import Program
from ._grouping import Conflict
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
        brought: weights that foreign passes have brought, of which no plan speaks; ``None``: none has run.
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
    brought: frozenset[str] | None = None
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


__all__ = ["Coupling"]
