"""What a calibration decides of a program; cut consumers whose channel sets were decided, and repair what
stays of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from fasp_fx.analysis import Analysis, Group
from fasp_fx.base import keep, warn
from fasp_fx.capturing import Runner, attribute
from fasp_fx.errors import CalibrationWarning

from ._consumers import Consumer, Consumers
from ._journal import Decide
from ._matrices import read_otherwise
from ._restoration import Problem, Restore, Restored, together

T = TypeVar("T")
#: tokens held out from which on they may choose any strength of the ridge
_JUDGES = 8
#: tokens for each column from which it is not the amount of data that limits a repair
_ENOUGH = 10


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


@dataclass(frozen=True)
class Repairs:
    """Cuts and repairs consumers one after another.

    Attributes:
        consumers: those of the program, with what was seen of them.
        runner: runs the program, and gets the weights that take the places of others.
        restore: repairs a consumer; ``None``: what stays is left as it is.
        strength: how much of the drift they make up for (:class:`fasp_fx.calibration.Drift`).
        decision: says what goes, and gets what is repaired.
    """

    consumers: Consumers
    runner: Runner
    restore: Restore | None
    strength: float
    decision: Decision

    def weight(self, consumer: Consumer) -> Tensor:
        """What a consumer's weight is now."""
        restored = self.decision.weights.get(consumer.weight)
        return restored if restored is not None else self.consumers.weight(consumer)

    def brought(self, consumer: Consumer) -> Tensor:
        """The same where nodes are executed."""
        return cast(Tensor, self.runner.bring(self.weight(consumer)))

    def finish(self, consumer: Consumer, decide: Decide) -> None:
        """Cut a consumer all of whose groups are decided, and repair it. What was seen of it is let go.

        Args:
            decide: makes the decision which weights it has, or recalls it.
        """
        gone = self.decision.gone
        columns, blocks = consumer.gone(gone), consumer.blocks_gone(gone)
        if columns.any() or blocks.any():
            weight, matrices = self.weight(consumer), consumer.matrices.read(self.brought(consumer))
            kept = torch.from_numpy(~columns).to(matrices.device)
            pruned = self._repaired(consumer, matrices, kept, decide)
            if pruned is None:
                pruned = consumer.matrices.write((matrices * kept[:, None]).to(weight.device), weight)
            if blocks.any():
                # Tokens of an expert that goes were sent to it already: it gives them nothing, and no other
                # takes its place.
                stays = torch.from_numpy(~blocks).to(weight.device)
                pruned = consumer.matrices.write(
                    consumer.matrices.read(pruned) * stays[:, None, None], weight
                )
            self.runner.overrides[consumer.weight] = keep(pruned)
        consumer.grams = None

    def _repaired(self, consumer: Consumer, matrices: Tensor, kept: Tensor, decide: Decide) -> Tensor | None:
        """The repaired weight of a consumer; ``None`` where it is only cut."""
        weight = self.weight(consumer)
        # The Gram matrix holds no imaginary part, which the solution for a complex weight would need.
        if self.restore is None or weight.is_complex() or bool(kept.all()):
            return None
        otherwise = read_otherwise(self.consumers.analysis, consumer.matrices)
        if otherwise is not None:
            self.decision.notes.append(f"'{consumer.weight}' is not repaired, because {otherwise}")
            return None
        outcome = self._restored(self.restore, consumer, matrices, kept, decide)
        shown = replace(outcome, weight=outcome.weight.to("meta"))  # its values are elsewhere
        self.decision.outcomes.setdefault(consumer.weight, []).append(shown)
        pruned = keep(consumer.matrices.write(outcome.weight.to(weight.device), weight))
        self.decision.weights[consumer.weight] = pruned
        return pruned

    def _restored(
        self, restore: Restore, consumer: Consumer, matrices: Tensor, kept: Tensor, decide: Decide
    ) -> Restored:
        """The repair of a consumer's matrices, whose bias is raised along."""
        if consumer.intercept is not None:
            # A column of ones that stays, whose weight is added to the bias.
            matrices = torch.cat([matrices, torch.zeros_like(matrices[:, :, :1])], 2)
            kept = torch.cat([kept, torch.ones_like(kept[:, :1])], 1)
        if consumer.drift_rows:
            # What the rows are to make up for counts as columns of their own, which go.
            unit = torch.eye(consumer.drift_rows, dtype=matrices.dtype, device=matrices.device)
            matrices = torch.cat([matrices, self.strength * unit.expand(len(matrices), -1, -1)], 2)

        outcome = Restored(**decide(lambda: vars(restored(restore, consumer, matrices, kept))))
        if consumer.intercept is None:
            return outcome
        if bool((raised := outcome.weight[:, :, -1].reshape(-1)).any()):
            bias: Tensor = attribute(self.consumers.analysis.program.module, consumer.intercept).detach()
            self.decision.weights[consumer.intercept] = keep(bias + raised.to(bias))
            self.decision.biases[consumer.weight] = consumer.intercept
            self.runner.overrides[consumer.intercept] = self.decision.weights[consumer.intercept]
        return replace(outcome, weight=outcome.weight[:, :, :-1])


def restored(restore: Restore, consumer: Consumer, matrices: Tensor, kept: Tensor) -> Restored:
    """The outcome of a repair, block by block.

    Args:
        matrices: ``[blocks, rows, columns]``, perhaps with further columns, which go.
        kept: which stay of the columns that come back, ``[blocks, columns]``.
    """
    grams, blocks = consumer.grams or (), []
    for matrix, gram, stays in zip(matrices, grams, kept, strict=True):
        fitted, *judging = map(keep, gram.compact())
        places, has_ones = stays.nonzero()[:, 0], consumer.intercept is not None
        # Weights that meet about as many tokens as there are unknowns fit no others, which a handful of them
        # held out need not show: a ridge as strong as there are unknowns for each token keeps them near.
        few = 0 < gram.held.tokens < _JUDGES and gram.fitted.tokens > 0
        problem = Problem(matrix, fitted, judging[0] if judging else None, places, has_ones)
        outcome = restore(problem, len(places) / gram.fitted.tokens if few else 0.0)
        blocks.append(replace(outcome, weight=outcome.weight[:, : len(stays)]))
    return replace(together(blocks), tokens=min(gram.tokens for gram in grams))


def warn_of_few(outcomes: Mapping[str, Sequence[Restored]]) -> list[str]:
    """Warn where at least half of the consumers saw fewer tokens than they have columns, or few tokens and
    were not repaired; the messages.

    Args:
        outcomes: of each consumer.
    """
    tokens = {name: min(outcome.tokens for outcome in each) for name, each in outcomes.items()}
    columns = {name: each[0].weight.shape[-1] for name, each in outcomes.items()}
    few = [
        name
        for name, each in outcomes.items()
        if tokens[name] < columns[name] * (1 if any(outcome.used for outcome in each) else _ENOUGH)
    ]
    if not few or 2 * len(few) < len(columns):
        return []
    first = min(few, key=lambda name: tokens[name] / columns[name])
    message = (
        f"too little calibration data to repair {len(few)} of {len(columns)} consumers: '{first}' has"
        f" {columns[first]:,} columns and saw {tokens[first]:,} inputs (tokens, pixels, rows), a quarter of"
        " which is held out to judge repairs by; a repair that gains next to nothing there is not made, and"
        " one that few judge keeps near the weights as they were; calibrate on more, some"
        f" {_ENOUGH * columns[first]:,} inputs of four sequences or images, or more"
    )
    warn(message, CalibrationWarning)
    return [message]


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
