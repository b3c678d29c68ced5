"""What a language model is worth and what it costs: perplexity and latency, of a dense or a pruned model
alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base._device import device_of
from ..calibration.losses import output_tensors
from ..errors import ArgumentError


def perplexity(model: nn.Module, chunks: Tensor, *, progress: Callable[[float], None] | None = None) -> float:
    """Mean cross-entropy over the ``length - 1`` predictions of each chunk, exponentiated.

    Args:
        model: called with ``input_ids`` and ``use_cache=False``, one chunk at a time, in evaluation mode; its
            own mode is as before afterwards. The first tensor that it returns are the logits.
        chunks: tokens ``[chunks, length]``.
        progress: called with the fraction done.

    Raises:
        ArgumentError: there is nothing to predict.
    """
    shape = tuple(chunks.shape) if isinstance(chunks, Tensor) else ()
    if len(shape) != 2 or not shape[0] or shape[1] < 2:
        raise ArgumentError(
            f"chunks is a {type(chunks).__name__} of shape {shape}; perplexity needs a tensor of token"
            " numbers [chunks, length] with at least one chunk of two tokens"
        )
    total, training = 0.0, model.training
    model.eval()
    for index, chunk in enumerate(chunks, 1):
        ids = chunk[None].to(device_of(model))
        with torch.no_grad():
            logits = output_tensors(model(input_ids=ids, use_cache=False))[0]
        total += float(functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum"))
        if progress is not None:
            progress(index / len(chunks))
    model.train(training)
    mean = total / (len(chunks) * (chunks.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf


def latency(
    models: Sequence[nn.Module],
    ids: Tensor,
    *,
    repeats: int = 5,
    progress: Callable[[float], None] = lambda fraction: None,
) -> list[float]:
    """Median seconds of one forward pass of each model on ``ids`` (a prefill without cache).

    The models take turns, so that whatever else the machine does hits all of them alike; one pass of each
    goes before and is not counted.

    Args:
        ids: tokens ``[batch, length]``.
        repeats: passes that count.
        progress: called with the fraction done.
    """
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(repeats + 1):
        for model, taken in zip(models, seconds):
            held = ids.to(device_of(model))
            start = time.perf_counter()
            with torch.no_grad():
                logits = output_tensors(model(input_ids=held, use_cache=False))[0]
            logits[..., -1, -1].cpu()  # waits until they are computed
            taken.append(time.perf_counter() - start)
        progress((turn + 1) / (repeats + 1))
    return [statistics.median(taken[1:]) for taken in seconds]


__all__ = ["latency", "perplexity"]
