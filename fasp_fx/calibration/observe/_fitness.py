"""How far a pruned model's outputs are from the dense model's, by the loss that was asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...base.compare import unfilled
from ...base.offload._current import keep
from ..losses import (
    Loss,
    Outputs,
    Padding,
    evaluated,
    next_token,
    number_outputs,
    predictions,
    without_padding,
)

#: so many of the dense model's most likely tokens are told apart
LIKELIEST = 64
#: logits of so many tokens that count are looked at together
_AT_ONCE = 256


class Fitness(ABC):
    """Compares outputs on one sequence with those that the dense model gave.

    Attributes:
        said: what it is, for the report.
    """

    said: str

    def remember(self, outputs: Any, inputs: Mapping[str, Any], padding: Padding) -> Any:
        """What is kept of the dense model's outputs."""
        return None

    def settle(self, remembered: Sequence[Any], own: int, add: Callable[[Tensor], Tensor]) -> None:  # noqa: B027 (most need not)
        """Look at all that is kept, before anything is compared.

        Args:
            own: how many of them count here, the first ones; the others do in other processes.
            add: what a sum becomes over all processes.
        """

    @abstractmethod
    def loss(self, remembered: Any, outputs: Any, inputs: Mapping[str, Any], padding: Padding) -> float:
        """How far the outputs are from those that were kept."""


class Divergence(Fitness):
    """The mean over tokens of KL(dense ‖ pruned) of the next token, where the tokens that the dense model
    thinks less likely count as one outcome.

    What is left of a divergence when outcomes are put together is never more than the whole (the
    data-processing inequality), and zero where the two agree.

    Args:
        likeliest: how many tokens are told apart.
    """

    said = "the KL divergence from the dense model's next tokens"

    def __init__(self, likeliest: int = LIKELIEST) -> None:
        self.likeliest = likeliest

    def remember(self, outputs: Any, inputs: Mapping[str, Any], padding: Padding) -> tuple[Tensor, Tensor]:
        """The likeliest tokens ``[tokens, likeliest]``, and the logarithms of their probabilities and of that
        of the others, ``[tokens, likeliest + 1]``.
        """
        chosen, held = [], []
        for logits in _pieces(outputs, inputs, padding):
            chosen.append(logits.topk(min(self.likeliest, logits.shape[1])).indices)
            held.append(_coarse(logits, chosen[-1]))
        return keep(torch.cat(chosen).to(torch.int32)), keep(torch.cat(held))

    def loss(self, remembered: Any, outputs: Any, inputs: Mapping[str, Any], padding: Padding) -> float:
        total, tokens = 0.0, 0
        chosen, dense = remembered
        for logits, own, expected in zip(
            _pieces(outputs, inputs, padding), chosen.split(_AT_ONCE), dense.split(_AT_ONCE), strict=True
        ):
            likely = expected.exp()
            terms = torch.where(likely > 0, likely * (expected - _coarse(logits, own.long())), 0.0)
            total, tokens = total + float(terms.sum(dtype=torch.float32).double()), tokens + len(logits)
        return total / max(tokens, 1)


class Error(Fitness):
    """Half the mean squared error of all floating-point outputs, each relative to its mean square over all
    sequences, without fillings.
    """

    said = "half the squared error of the outputs, relative to their mean square"

    def remember(self, outputs: Any, inputs: Mapping[str, Any], padding: Padding) -> list[Tensor]:
        return [keep(values.clone()) for values in _values(outputs, padding)]

    def settle(self, remembered: Sequence[Any], own: int, add: Callable[[Tensor], Tensor]) -> None:
        sums = torch.zeros(len(remembered[0]), 2, dtype=torch.float64)
        for outputs in remembered[:own]:
            counted = [unfilled(leaf, leaf) for leaf in outputs]
            sums += torch.tensor(
                [[float(leaf.double().square().sum()), leaf.numel()] for leaf in counted], dtype=torch.float64
            )
        sums = add(sums)
        self._squares = (sums[:, 0] / sums[:, 1].clamp_min(1)).tolist()

    def loss(self, remembered: Any, outputs: Any, inputs: Mapping[str, Any], padding: Padding) -> float:
        total, count = 0.0, 0
        for dense, values, square in zip(remembered, _values(outputs, padding), self._squares, strict=True):
            if square > 0:  # what is zero throughout has no size
                counted, wanted = unfilled(values, dense), unfilled(dense, dense)
                total += float((counted.double() - wanted.double()).square().sum()) / square
                count += counted.numel()
        return total / max(count, 1) / 2


class Terms(Fitness):
    """The mean of the terms of a loss of the caller's, which needs nothing of the dense model.

    Args:
        loss: the caller's.
    """

    said = "the loss that was given"

    def __init__(self, loss: Loss) -> None:
        self._loss = loss

    def loss(self, remembered: Any, outputs: Any, inputs: Mapping[str, Any], padding: Padding) -> float:
        return float(evaluated(self._loss, outputs, inputs, padding).double().mean())


def fitness_of(loss: Loss | None) -> Fitness:
    """What a loss is searched by; ``None``: none was given."""
    if loss is None or isinstance(loss, Outputs):
        return Error()
    return Divergence() if loss is next_token else Terms(loss)


def _pieces(outputs: Any, inputs: Mapping[str, Any], padding: Padding) -> Iterable[Tensor]:
    """The logits of tokens that count, ``[tokens, vocabulary]``, so many of these at a time."""
    logits, _, counts = predictions(outputs, inputs, padding)
    for own in counts.to(logits.device).flatten().nonzero().flatten().split(_AT_ONCE):
        yield logits.flatten(0, 1)[own].float()


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


__all__ = ["Divergence", "Error", "Fitness", "Terms", "fitness_of"]
