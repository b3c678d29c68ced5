"""Try what an allocation costs: run the model as if it was pruned by it, with the weights of consumers
replaced.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...allocation._limits import check_counts
from ...allocation._search import Trial
from ...analysis.groups import Group
from ...base._device import float32_products
from ...base._undisturbed import drawing_alike
from ...base.offload._current import keep
from ...capturing._runner import Runner
from ...errors import ArgumentError
from ..losses import Loss
from ..obs import DAMPING
from ..restoration import damped
from ..scoring import Order
from ..statistics import SplitGram
from ._consumers import Consumer, Consumers
from ._fitness import fitness_of
from ._gradients import called, padding_of
from ._marks import Marks
from ._pieces import Piece, returned
from ._ranks import Ranks
from ._readings import read_otherwise

#: repaired weights are kept of so many times the elements of all consumers
_KEPT = 2


class ModelTrial:
    """Runs the dense model with the weights of consumers as an allocation would leave them.

    Of each group the first channel sets of its order go. Every consumer is repaired in closed form on what
    was seen of the dense model, with the ridge that predicted losses count on (:mod:`fasp_fx.obs`); channels
    of products of activations stay.

    Args:
        consumers: with the Gram matrices of the dense model's activations, which stay with this.
        orders: of the groups that have one, by name.
        pieces: calibration sequences, some of which are taken, evenly.
        marks: which tokens of the pieces are padding.
        loss: what a candidate is judged by (:mod:`fasp_fx.calibration.observe._fitness`).
        most: how many sequences are taken at most.
        repairs: whether consumers are repaired; otherwise the removed columns are zero.
        precision: of products of float32 while a candidate runs.
        ranks: the processes that share the sequences.
    """

    def __init__(
        self,
        consumers: Consumers,
        orders: Mapping[str, Order],
        pieces: Sequence[Piece],
        marks: Marks,
        loss: Loss | None,
        most: int,
        repairs: bool,
        precision: str,
        ranks: Ranks,
    ) -> None:
        self.analysis, self.ranks, self.fitness = consumers.analysis, ranks, fitness_of(loss)
        self._consumers, self._marks, self._precision = consumers, marks, precision
        self._orders = {name: ranks.first(order.sets) for name, order in orders.items()}
        self.count = min(most, len(pieces))
        self._places = [index * len(pieces) // self.count for index in range(self.count)]
        self._pieces = [pieces[place] for place in self._places]
        self._by_weight: dict[str, list[Consumer]] = {}
        for consumer in consumers.by_key.values():
            self._by_weight.setdefault(consumer.weight, []).append(consumer)
        self._touching = {
            name: [
                index
                for index, group in enumerate(self.analysis.chosen)
                if not set(own).isdisjoint(consumers.of_group[group.name])
            ]
            for name, own in self._by_weight.items()
        }
        self._grams = {
            consumer: consumer.grams
            for consumer in consumers.by_key.values()
            if repairs and self._is_repaired(consumer)
        }
        self._made: OrderedDict[tuple[str, tuple[int, ...]], Tensor] = OrderedDict()
        self._room = _KEPT * sum(consumers.weight(own[0]).numel() for own in self._by_weight.values())
        self._dense: dict[int, Any] | None = None

    def losses(self, lost: Sequence[int], sequences: Sequence[int]) -> list[float]:
        """The loss on each of some of the sequences taken, in all processes; arguments as for
        :class:`fasp_fx.allocation.Trial`, of all chosen groups.
        """
        if self._dense is None:
            self._dense = self._remembered()
        found = torch.zeros(len(sequences), dtype=torch.float64)
        weights = self._weights(lost)
        for place, number in enumerate(sequences):
            if number % self.ranks.size == self.ranks.rank:
                value = self.fitness.loss(self._dense[number], *self._run(number, weights))
                found[place] = value if math.isfinite(value) else math.inf
        return self.ranks.first(self.ranks.add(found).tolist())

    def _remembered(self) -> dict[int, Any]:
        """What is kept of the dense model's outputs, by sequence."""
        own = list(range(self.ranks.rank, self.count, self.ranks.size))
        found = {
            number: self.fitness.remember(*self._run(number, {}))
            for number in own or [0]  # a process that has none finds out what outputs there are
        }
        self.fitness.settle(list(found.values()), len(own), self.ranks.add)
        return found

    def _run(self, number: int, weights: Mapping[str, Tensor]) -> tuple[Any, Any, Any]:
        """What the model returns for a sequence with these weights, the arguments of the call, and which
        tokens are padding.
        """
        piece, program = self._pieces[number], self.analysis.program
        with torch.no_grad(), drawing_alike(program.weights().values()), float32_products(self._precision):
            run = Runner(program, [piece.inputs], numbers=[piece.batch])
            run.overrides |= weights
            run.advance(len(run.nodes) - 1)
            leaves = returned(program, run)
        return *called(program, leaves, piece.inputs), padding_of(
            program, leaves, self._marks, self._places[number]
        )

    def _weights(self, lost: Sequence[int]) -> dict[str, Tensor]:
        """The weights that are not as in the dense model."""
        found = {}
        for name, touching in self._touching.items():
            levels = tuple(lost[index] for index in touching)
            if any(levels):
                found[name] = self._weight(name, levels)
        return found

    def _weight(self, name: str, levels: tuple[int, ...]) -> Tensor:
        """A weight once the groups that it is a consumer of have lost so much."""
        key = (name, levels)
        if key not in self._made:
            self._made[key] = keep(self._repaired(name, levels))
            while len(self._made) > 1 and sum(weight.numel() for weight in self._made.values()) > self._room:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]

    @torch.no_grad()
    def _repaired(self, name: str, levels: tuple[int, ...]) -> Tensor:
        labels = self.analysis.labels
        removed = np.zeros(int(labels.max(initial=-1)) + 1, dtype=bool)
        for index, count in zip(self._touching[name], levels, strict=True):
            group = self.analysis.chosen[index]
            if count:
                removed[group.sets[self._orders[group.name][:, :count].reshape(-1)]] = True
        gone = removed[labels]
        weight = self._consumers.weight(self._by_weight[name][0])
        for consumer in self._by_weight[name]:
            kept = torch.from_numpy(~consumer.gone(gone)).to(weight.device)
            whole = torch.from_numpy(~consumer.blocks_gone(gone)).to(weight.device)
            grams: Sequence[SplitGram | None] = self._grams.get(consumer) or [None] * len(kept)
            matrices = torch.stack(
                [_cut(*block) for block in zip(consumer.matrices.read(weight), kept, grams, strict=True)]
            )
            weight = consumer.matrices.write(matrices * whole[:, None, None], weight)
        return weight

    def _is_repaired(self, consumer: Consumer) -> bool:
        """Whether the calibration would repair it."""
        return (
            not self._consumers.weight(consumer).is_complex()
            and read_otherwise(self.analysis, consumer.matrices) is None
        )


class AskedTrial(Trial):
    """A trial of a budget that has fewer groups than the model, or groups that stand for others.

    Args:
        model: runs the model.
        groups: those of the budget.
        spread: what all groups lose, of what those of the budget lose.
        advance: called with the fraction of the search done.

    Attributes:
        notes: what came of it, for the report.
    """

    def __init__(
        self,
        model: ModelTrial,
        groups: Sequence[Group],
        spread: Callable[[Sequence[int]], Sequence[int]],
        advance: Callable[[float], None],
    ) -> None:
        self.count, self.notes = model.count, list[str]()
        self._model, self._groups, self._spread = model, groups, spread
        self._advance = advance

    def losses(self, lost: Sequence[int], sequences: Sequence[int]) -> list[float]:
        if bad := [number for number in sequences if number not in range(self.count)]:
            raise ArgumentError(f"there is no sequence {bad[0]!r}; there are {self.count}, from 0 on")
        return self._model.losses(self._spread(check_counts(lost, self._groups)), sequences)

    def progress(self, fraction: float) -> None:
        self._advance(fraction)

    def note(self, before: float, after: float, tried: int) -> None:
        sequences = f"{self.count} sequence{'s' if self.count > 1 else ''}"
        self.notes.append(
            f"search: {self._model.fitness.said} on {sequences} went from {before:.4g} to {after:.4g};"
            f" {tried} candidates were tried"
        )


def _cut(matrix: Tensor, kept: Tensor, gram: SplitGram | None) -> Tensor:
    """One block of a consumer without the columns that go, ``[rows, columns]``."""
    if gram is None or bool(kept.all()):
        return matrix * kept
    return damped(matrix, gram.symmetric()[: len(kept), : len(kept)], kept.nonzero()[:, 0], DAMPING)


__all__ = ["AskedTrial", "ModelTrial"]
