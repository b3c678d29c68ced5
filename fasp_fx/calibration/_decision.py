"""What a calibration decides of a program."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from torch import Tensor

from fasp_fx.analysis import Analysis, Group

from ._restoration import Restored

T = TypeVar("T")


@dataclass
class Decision:
    """What was chosen.

    Attributes:
        gone: removed channel numbers.
        weights: restored weights and biases by canonical name.
        biases: by the names of restored weights, the biases that were restored along.
        outcomes: of the restorations of weights.
        notes: remarks for the report.
    """

    gone: np.ndarray
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, list[Restored]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, analysis: Analysis, group: Group, sets: np.ndarray) -> None:
        """Have some channel sets of a group go, given by their places among those of the group."""
        self.gone = self.gone | np.isin(analysis.labels, group.sets[sets])


def nothing(analysis: Analysis) -> Decision:
    """The decision to leave a program as it is."""
    return Decision(np.zeros(analysis.numbering.total, dtype=bool))


def decided(analysis: Analysis, decision: Decision) -> list[Group]:
    """The groups that lose anything, in graph order."""
    return [group for group in analysis.chosen if decision.gone[np.isin(analysis.labels, group.sets)].any()]


def restricted(analysis: Analysis, decision: Decision, kept: Collection[Group]) -> Decision:
    """The decision for the groups ``kept`` alone.

    A weight that was repaired for a group which stays whole now is as it was captured.
    """
    names = {group.name for group in kept}
    dropped = [group for group in decided(analysis, decision) if group.name not in names]
    if not dropped:
        return decision
    undone = {use.weight for group in dropped for use in group.uses}
    undone |= {bias for name, bias in decision.biases.items() if name in undone}

    def rest(by_name: Mapping[str, T]) -> dict[str, T]:
        return {name: value for name, value in by_name.items() if name not in undone}

    return Decision(
        decision.gone & ~np.isin(analysis.labels, np.concatenate([group.sets for group in dropped])),
        rest(decision.weights),
        rest(decision.biases),
        rest(decision.outcomes),
        decision.notes,
    )


def places_of(analysis: Analysis, gone: np.ndarray) -> dict[str, np.ndarray]:
    """Which channel sets go of each group that loses any, by their places among those of the group.

    Args:
        gone: for every channel number, whether it goes.
    """
    sets = np.unique(analysis.labels[: len(gone)][gone])
    places = {group.name: np.flatnonzero(np.isin(group.sets, sets)) for group in analysis.chosen}
    return {name: some for name, some in places.items() if len(some)}
