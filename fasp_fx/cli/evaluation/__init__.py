"""What a language model is worth and what it costs: perplexity, zero-shot tasks and latency, of a dense or a
pruned model alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...base._device import device_of
from ...errors import ArgumentError
from ._modes import in_evaluation


def perplexity(model: nn.Module, chunks: Tensor, *, progress: Callable[[float], None] | None = None) -> float:
    """Mean cross-entropy over the ``length - 1`` predictions of each chunk, exponentiated.

    Args:
        model: called with ``input_ids`` and ``use_cache=False``, one chunk at a time, in evaluation mode; its
            own mode is as before afterwards.
        chunks: tokens ``[chunks, length]``.
        progress: called with the fraction done.

    Raises:
        ArgumentError: there is nothing to predict.
    """
    if not isinstance(chunks, Tensor):
        raise ArgumentError(
            f"chunks is a {type(chunks).__name__}; perplexity needs a tensor of token numbers [chunks,"
            " length]"
        )
    if chunks.dim() != 2 or not len(chunks) or chunks.shape[1] < 2:
        raise ArgumentError(
            f"chunks has the shape {tuple(chunks.shape)}; perplexity needs [chunks, length] with at least one"
            " chunk of two tokens"
        )
    device = device_of(model)
    total = 0.0
    with in_evaluation(model), torch.no_grad():
        for index, chunk in enumerate(chunks):
            ids = chunk[None].to(device)
            logits = _logits(model(input_ids=ids, use_cache=False))
            total += float(functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum"))
            if progress is not None:
                progress((index + 1) / len(chunks))
    mean = total / (len(chunks) * (chunks.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: its name; of a file, the file's.
        metric: as lm-eval names it, with the filter in brackets where a task has several.
        value: the mean over the examples.
        stderr: its standard error, or ``None`` where the harness has none.
        examples: how many were scored.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    examples: int


def tasks(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Callable[[float], None] | None = None,
) -> list[TaskScore]:
    """Scores of zero-shot tasks, computed by EleutherAI's lm-evaluation-harness (``pip install
    "fasp_fx[eval]"``).

    A name is that of a task, group or tag of the harness, whose data comes from the Hugging Face hub, or a
    file ending in ``.jsonl`` with one multiple-choice question per line: ``{"query": text, "choices": [text,
    ...], "gold": index of the right one}``. Of each choice counts the summed log-likelihood of ``" " +
    choice`` after the query: as it is (``acc``), divided by the choice's length in characters (``acc_norm``),
    or in bytes of UTF-8 (``acc_bytes``).

    Args:
        model: a Hugging Face causal language model, or a module called with ``input_ids`` and
            ``use_cache=False`` that returns logits.
        tokenizer: the model's, as ``AutoTokenizer`` loads it.
        limit: only the first so many examples of each task.
        batch_size: texts per call of the model.
        progress: called with the fraction done.

    Raises:
        ArgumentError: lm-eval is missing, a task is unknown, its data cannot be had or is malformed, or a
            text is longer than the model takes.
    """
    from . import _harness

    return score_loaded(
        model, tokenizer, _harness.load_tasks(names), limit=limit, batch_size=batch_size, progress=progress
    )


def score_loaded(
    model: nn.Module,
    tokenizer: Any,
    loaded: Any,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Callable[[float], None] | None = None,
) -> list[TaskScore]:
    """:func:`tasks` with tasks that are loaded already, which several models can share."""
    from . import _harness

    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ArgumentError(f"{name} is {value}; use at least 1")
    found = _harness.run(model, tokenizer, loaded, limit=limit, batch_size=batch_size, progress=progress)
    scores = []
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = figures.get(f"{metric}_stderr,{chosen}")
            shown = metric if chosen == "none" else f"{metric} ({chosen})"
            scores.append(
                TaskScore(
                    task,
                    shown,
                    float(value),
                    float(error) if isinstance(error, (int, float)) else None,
                    int(figures["sample_len"]),
                )
            )
    return scores


def latency(
    models: Sequence[nn.Module],
    ids: Tensor,
    *,
    repeats: int = 5,
    progress: Callable[[float], None] | None = None,
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


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return output["logits"] if isinstance(output, dict) else output[0]


__all__ = ["TaskScore", "latency", "perplexity", "tasks"]
