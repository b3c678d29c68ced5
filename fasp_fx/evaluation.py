"""What a language model is worth and what it costs: perplexity and latency, of a dense or a pruned model alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import ArgumentError


def perplexity(model: nn.Module, chunks: Tensor, *, progress: Callable[[float], None] | None = None) -> float:
    """Mean cross-entropy over the ``length - 1`` predictions of each chunk, exponentiated.

    Args:
        model: called with ``input_ids`` and ``use_cache=False``, one chunk at a time.
        chunks: tokens ``[chunks, length]``.
        progress: called with the fraction done.

    Raises:
        ArgumentError: there is nothing to predict.
    """
    if chunks.dim() != 2 or not len(chunks) or chunks.shape[1] < 2:
        raise ArgumentError(f"chunks has the shape {tuple(chunks.shape)}; perplexity needs [chunks, length] with at least one chunk of two tokens")
    device = device_of(model)
    total = 0.0
    for index, chunk in enumerate(chunks):
        ids = chunk[None].to(device)
        with torch.no_grad():
            logits = _logits(model(input_ids=ids, use_cache=False))
            total += float(functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum"))
        if progress is not None:
            progress((index + 1) / len(chunks))
    mean = total / (len(chunks) * (chunks.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf


def latency(models: Sequence[nn.Module], ids: Tensor, *, repeats: int = 5, progress: Callable[[float], None] | None = None) -> list[float]:
    """Median seconds of one forward pass of each model on ``ids`` (a prefill without cache).

    The models take turns, so that whatever else the machine does hits all of them alike; one pass of each goes before and is not counted.

    Args:
        ids: tokens ``[batch, length]``.
        repeats: passes that count.
        progress: called with the fraction done.
    """
    seconds: list[list[float]] = [[] for _ in models]
    total = (repeats + 1) * len(models)
    for turn in range(repeats + 1):
        for index, model in enumerate(models):
            device = device_of(model)
            held = ids.to(device)
            _wait(device)
            start = time.perf_counter()
            with torch.no_grad():
                model(input_ids=held, use_cache=False)
            _wait(device)
            if turn:
                seconds[index].append(time.perf_counter() - start)
            if progress is not None:
                progress((turn * len(models) + index + 1) / total)
    return [statistics.median(measured) for measured in seconds]


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's weights."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return output["logits"] if isinstance(output, dict) else output[0]


__all__ = ["device_of", "latency", "perplexity"]
