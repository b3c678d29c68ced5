"""Try what an allocation costs: run the model as if it was pruned by it, with the weights of consumers
replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fasp_fx.allocation import Budget, Trial, check_counts
from fasp_fx.base import drawing_alike, float32_products, keep, unfilled
from fasp_fx.capturing import Runner

from ._gradients import Observation, outcome
from ._losses import (
    Loss,
    Outputs,
    Padding,
    evaluated,
    next_token,
    number_outputs,
    predictions,
    without_padding,
)
from ._matrices import read_otherwise
from ._obs import DAMPING
from ._restoration import damped
from ._scoring import Order
from ._statistics import SplitGram, whole

#: so many versions of all repaired weights are kept
_KEPT = 2


class Candidates(Protocol):
    """Runs a model as it would be pruned.

    Attributes:
        count: sequences to run it on.
        description: of what it is judged by.
    """

    count: int
    description: str

    def losses(self, lost: Sequence[int], sequences: Sequence[int]) -> list[float]:
        """As for :meth:`fasp_fx.allocation.Trial.losses`, of all groups of the model."""


@dataclass
class BudgetTrial(Trial):
    """Tries allocations of a budget, which may have fewer groups than the model, or groups that stand for
    others.

    Attributes:
        candidates: runs the model.
        budget: whose groups lose what is tried.
        advance: called with the fraction of a search done.
        notes: what came of the search, for the report.
    """

    candidates: Candidates
    budget: Budget
    advance: Callable[[float], None]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.count = self.candidates.count

    def losses(self, lost: Sequence[int], sequences: Sequence[int]) -> list[float]:
        """Raises:
        ArgumentError: what is to be lost cannot be.
        """
        return self.candidates.losses(self.budget.spread(check_counts(lost, self.budget.groups)), sequences)

    def progress(self, fraction: float) -> None:
        self.advance(fraction)

    def note(self, before: float, after: float, tried: int) -> None:
        sequences = f"{self.count} sequence{'s' if self.count > 1 else ''}"
        self.notes.append(
            f"search: {self.candidates.description} on {sequences} went from {before:.4g} to {after:.4g};"
            f" {tried} candidates were tried"
        )


class ModelTrial:
    """Runs the dense model with the weights of consumers as an allocation would leave them.

    Of each group the first channel sets of its order go. Every consumer is repaired in closed form on what
    was seen of the dense model, with the ridge that predicted losses count on
    (:class:`fasp_fx.calibration.OBS`); channels of products of activations stay.

    Args:
        observation: of the dense model; its consumers, with their Gram matrices, stay with this, and some of
            its pieces are taken, evenly.
        orders: of the groups that have one, by name.
        most: how many sequences are taken at most.
        precision: of products of float32 while a candidate runs.
    """

    def __init__(
        self, observation: Observation, orders: Mapping[str, Order], most: int, precision: str
    ) -> None:
        self._observation, self._precision = observation, precision
        consumers, ranks, pieces = observation.consumers, observation.ranks, observation.pieces
        self.analysis, self.fitness = consumers.analysis, fitness_of(observation.loss)
        self.count, self.description = min(most, len(pieces)), self.fitness.description
        self._orders = {name: ranks.first(order.sets) for name, order in orders.items()}
        self._places = [index * len(pieces) // self.count for index in range(self.count)]
        names = dict.fromkeys(consumer.weight for consumer in consumers)
        self._by_weight = {name: [each for each in consumers if each.weight == name] for name in names}
        self._touching = {
            name: [
                index
                for index, group in enumerate(self.analysis.chosen)
                if not set(readers).isdisjoint(consumers.of_group[group.name])
            ]
            for name, readers in self._by_weight.items()
        }
        self._grams = {
            consumer: consumer.grams
            for consumer in consumers
            if consumers.is_repaired
            and not consumers.weight(consumer).is_complex()
            and read_otherwise(self.analysis, consumer.matrices) is None
        }
        #: by name, and what the groups that it is a consumer of have lost
        self._repairs: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._dense: dict[int, Any] = {}

    def losses(self, lost: Sequence[int], sequences: Sequence[int]) -> list[float]:
        """The loss on each of some of the sequences taken, in all processes."""
        weights = self._weights(lost)
        ranks, losses = self._observation.ranks, torch.zeros(len(sequences), dtype=torch.float64)
        for place, number in enumerate(sequences):
            if number % ranks.size == ranks.rank:
                if number not in self._dense:
                    self._dense[number] = self.fitness.remember(*self._run(number, {}))
                value = self.fitness.loss(self._dense[number], *self._run(number, weights))
                losses[place] = value if math.isfinite(value) else math.inf
        return ranks.first(ranks.add(losses).tolist())

    def _run(self, number: int, weights: Mapping[str, Tensor]) -> tuple[Any, dict[str, Any], Padding]:
        """What the model returns for a sequence with these weights, the arguments of the call, and which
        tokens are padding.
        """
        place, program = self._places[number], self.analysis.program
        piece = self._observation.pieces[place]
        with torch.no_grad(), drawing_alike(program.weights().values()), float32_products(self._precision):
            run = Runner(program, [piece.inputs], numbers=[piece.batch])
            run.overrides |= weights
            leaves = run.outputs()
        return outcome(program, leaves, piece, self._observation.roles, place)

    def _weights(self, lost: Sequence[int]) -> dict[str, Tensor]:
        """The weights that are not as in the dense model."""
        weights = {}
        levels = {name: tuple(lost[index] for index in each) for name, each in self._touching.items()}
        for key in (key for key in levels.items() if any(key[1])):
            if key not in self._repairs:
                if len(self._repairs) >= _KEPT * len(self._by_weight):
                    self._repairs.clear()
                self._repairs[key] = self._repaired(*key)
            weights[key[0]] = self._repairs[key]
        return weights

    @torch.no_grad()
    def _repaired(self, name: str, levels: tuple[int, ...]) -> Tensor:
        """A weight as the calibration would leave it, had each of its groups lost so much."""
        chosen = [self.analysis.chosen[index] for index in self._touching[name]]
        taken = [
            group.sets[self._orders[group.name][:, :count].reshape(-1)]
            for group, count in zip(chosen, levels, strict=True)
            if count
        ]
        gone = np.isin(self.analysis.labels, np.concatenate(taken))
        weight = self._observation.consumers.weight(self._by_weight[name][0])
        for consumer in self._by_weight[name]:
            kept = torch.from_numpy(~consumer.gone(gone)).to(weight.device)
            whole = torch.from_numpy(~consumer.blocks_gone(gone)).to(weight.device)
            grams: Sequence[SplitGram | None] = self._grams.get(consumer) or [None] * len(kept)
            matrices = torch.stack(
                [_cut(*block) for block in zip(consumer.matrices.read(weight), kept, grams, strict=True)]
            )
            weight = consumer.matrices.write(matrices * whole[:, None, None], weight)
        return keep(weight)


def _cut(matrix: Tensor, kept: Tensor, gram: SplitGram | None) -> Tensor:
    """One block of a consumer without the columns that go, ``[rows, columns]``."""
    if gram is None or bool(kept.all()):
        return matrix * kept
    return damped(matrix, whole(gram.total())[: len(kept), : len(kept)], kept.nonzero()[:, 0], DAMPING)


#: logits of so many tokens that count are looked at together
_AT_ONCE = 256


class Fitness:
    """Judges outputs on one sequence, beside those that the dense model gave: by the mean of the terms of a
    loss of the caller's, which needs nothing of the dense model.

    Attributes:
        description: what it is, for the report.
    """

    description = "the loss that was given"

    def __init__(self, loss: Loss = next_token) -> None:
        self._loss = loss

    def remember(self, outputs: Any, inputs: Mapping[str, Any], padding: Padding) -> Any:
        """What is kept of the dense model's outputs."""
        return None

    def loss(self, remembered: Any, outputs: Any, inputs: Mapping[str, Any], padding: Padding) -> float:
        """How bad the outputs are beside those that were kept."""
        return float(evaluated(self._loss, outputs, inputs, padding).double().mean())


class NextTokens(Fitness):
    """The mean over tokens of KL(dense ‖ pruned) of the next token, where the tokens that the dense model
    thinks less likely count as one outcome.

    What is left of a divergence when outcomes are put together is never more than the whole (the
    data-processing inequality), and zero where the two agree.

    Attributes:
        likeliest: how many tokens are told apart.
    """

    description = "the KL divergence from the dense model's next tokens"
    likeliest = 64

    def remember(self, outputs: Any, inputs: Mapping[str, Any], padding: Padding) -> tuple[Tensor, Tensor]:
        """The likeliest tokens ``[tokens, likeliest]``, and the logarithms of their probabilities and of that
        of the others, ``[tokens, likeliest + 1]``.
        """
        chosen, logarithms = [], []
        for logits in _pieces(outputs, inputs, padding):
            chosen.append(logits.topk(min(self.likeliest, logits.shape[1])).indices)
            logarithms.append(_coarse(logits, chosen[-1]))
        return keep(torch.cat(chosen).to(torch.int32)), keep(torch.cat(logarithms))

    def loss(self, remembered: Any, outputs: Any, inputs: Mapping[str, Any], padding: Padding) -> float:
        total, tokens = 0.0, 0
        known = (each.split(_AT_ONCE) for each in remembered)
        for logits, places, expected in zip(_pieces(outputs, inputs, padding), *known, strict=True):
            likely = expected.exp()
            terms = torch.where(likely > 0, likely * (expected - _coarse(logits, places.long())), 0.0)
            total, tokens = total + float(terms.sum(dtype=torch.float32).double()), tokens + len(logits)
        return total / max(tokens, 1)


class Error(Fitness):
    """Half the mean squared error of all floating-point outputs, each relative to its mean square, without
    fillings.
    """

    description = "half the squared error of the outputs, relative to their mean square"

    def remember(self, outputs: Any, inputs: Mapping[str, Any], padding: Padding) -> list[Tensor]:
        return [keep(values.clone()) for values in _values(outputs, padding)]

    def loss(self, remembered: Any, outputs: Any, inputs: Mapping[str, Any], padding: Padding) -> float:
        total, count = 0.0, 0
        for dense, values in zip(remembered, _values(outputs, padding), strict=True):
            counted, wanted = unfilled(values, dense).double(), unfilled(dense, dense).double()
            square = float(wanted.square().sum()) / max(wanted.numel(), 1)
            if square > 0:  # what is zero throughout has no size
                total += float((counted - wanted).square().sum()) / square
                count += counted.numel()
        return total / max(count, 1) / 2


def fitness_of(loss: Loss | None) -> Fitness:
    """What a loss is searched by; ``None``: none was given."""
    if loss is None or isinstance(loss, Outputs):
        return Error()
    return NextTokens() if loss is next_token else Fitness(loss)


def _pieces(outputs: Any, inputs: Mapping[str, Any], padding: Padding) -> Iterable[Tensor]:
    """The logits of tokens that count, ``[tokens, vocabulary]``, so many of these at a time."""
    logits, _, counts = predictions(outputs, inputs, padding)
    for places in counts.to(logits.device).flatten().nonzero().flatten().split(_AT_ONCE):
        yield logits.flatten(0, 1)[places].float()


def _coarse(logits: Tensor, chosen: Tensor) -> Tensor:
    """Logarithms of the probabilities of some tokens, and of that of all others together, ``[tokens, chosen +
    1]``.
    """
    whole = logits.logsumexp(1, keepdim=True)
    others = logits.scatter(1, chosen, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([logits.gather(1, chosen), others], 1) - whole


def _values(outputs: Any, padding: Padding) -> list[Tensor]:
    """What counts of each floating-point output."""
    return [without_padding(leaf.detach(), padding(leaf))[0] for leaf in number_outputs(outputs)]
