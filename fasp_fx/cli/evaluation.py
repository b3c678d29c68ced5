"""What a language model is worth and what it costs: perplexity and latency, of a dense or a pruned model
alike.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

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
    total = 0.0
    with _in_evaluation(model), torch.no_grad():
        for index, chunk in enumerate(chunks, 1):
            ids = chunk[None].to(device_of(model))
            logits = output_tensors(model(input_ids=ids, use_cache=False))[0]
            total += float(functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum"))
            if progress is not None:
                progress(index / len(chunks))
    mean = total / (len(chunks) * (chunks.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf


@contextlib.contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which dropouts are off, and each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


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

    def passed(model: nn.Module) -> float:
        """A point of time at which the model has computed what it was asked for."""
        device = device_of(model)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(repeats + 1):
        for model, taken in zip(models, seconds):
            held = ids.to(device_of(model))
            start = passed(model)
            with torch.no_grad():
                model(input_ids=held, use_cache=False)
            taken.append(passed(model) - start)
        progress((turn + 1) / (repeats + 1))
    return [statistics.median(taken[1:]) for taken in seconds]


__all__ = ["latency", "perplexity"]
