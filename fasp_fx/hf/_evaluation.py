"""What a language model is worth: its perplexity, dense or pruned alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fasp_fx.base import device_of, tensors_in
from fasp_fx.errors import ArgumentError


@dataclass(frozen=True)
class Predictions:
    """What a language model predicts of a text, token by token.

    Attributes:
        losses: the mean cross-entropy of each chunk.
        likeliest: the most probable tokens ``[chunks, length - 1]``.
    """

    losses: Sequence[float]
    likeliest: Tensor

    @property
    def perplexity(self) -> float:
        """The mean cross-entropy, exponentiated."""
        return _perplexity(self.losses)

    def same(self, other: Predictions) -> tuple[float, float]:
        """How often both hold the same token for the most probable, and the standard error of that."""
        return _estimate((self.likeliest == other.likeliest).double().mean(-1).tolist())


def predictions(
    model: nn.Module, chunks: Tensor, progress: Callable[[float], None] = lambda fraction: None
) -> Predictions:
    """What a model in evaluation mode predicts of a text; arguments and errors as for :func:`perplexity`."""
    shape = tuple(chunks.shape) if isinstance(chunks, Tensor) else ()
    if len(shape) != 2 or not shape[0] or shape[1] < 2:
        raise ArgumentError(
            f"chunks is a {type(chunks).__name__} of shape {shape}; perplexity needs a tensor of token"
            " numbers [chunks, length] with at least one chunk of two tokens"
        )
    figures = []
    for index, chunk in enumerate(chunks, 1):
        predicted = _predictions(model, chunk)
        figures.append((_loss(predicted, chunk), predicted.argmax(-1)))
        progress(index / len(chunks))
    losses, likeliest = zip(*figures, strict=True)
    return Predictions(losses, torch.stack(likeliest))


def perplexity(
    model: nn.Module, chunks: Tensor, *, progress: Callable[[float], None] = lambda fraction: None
) -> float:
    """Mean cross-entropy over the ``length - 1`` predictions of each chunk, exponentiated.

    Args:
        model: called with ``input_ids`` and ``use_cache=False``, one chunk at a time, in evaluation mode; its
            own mode is as before afterwards. The first tensor that it returns are the logits.
        chunks: tokens ``[chunks, length]``.
        progress: called with the fraction done.

    Raises:
        ArgumentError: there is nothing to predict.

    Examples:
        >>> hf.perplexity(llama, texts[0]) > 1
        True
    """
    training = model.training
    model.eval()
    result = predictions(model, chunks, progress).perplexity
    model.train(training)
    return result


class Judged(nn.Module):
    """A language model that keeps how well it predicts each text that it is called with, one at a time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._losses: list[float] = []

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        outputs = self.model(input_ids=input_ids, **options)
        self._losses.append(_loss(_predicted(outputs), input_ids[0]))
        return outputs

    def perplexity(self, first: int, count: int) -> float:
        """That of so many texts, from the number of the first."""
        return _perplexity(self._losses[first : first + count])


def _estimate(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent values, and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def _predictions(model: nn.Module, chunk: Tensor) -> Tensor:
    """The logarithms of the probabilities of each next token ``[length - 1, vocabulary]``, on the CPU."""
    with torch.no_grad():
        return _predicted(model(input_ids=chunk[None].to(device_of(model)), use_cache=False))


def _predicted(outputs: Any) -> Tensor:
    """The same, of what a model returned for one text."""
    return tensors_in(outputs)[0][0, :-1].float().log_softmax(-1).cpu()


def _loss(predicted: Tensor, chunk: Tensor) -> float:
    """The mean cross-entropy of a chunk."""
    return float(functional.nll_loss(predicted, chunk[1:].cpu()))


def _perplexity(losses: Sequence[float]) -> float:
    mean = statistics.fmean(losses)
    return math.exp(mean) if mean < 700 else math.inf
