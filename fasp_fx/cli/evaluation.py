"""What a language model is worth and what it costs: perplexity, zero-shot tasks and latency, of a dense or a
pruned model alike.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base._device import device_of
from ..base._tolerable import tolerable
from ..errors import ArgumentError, first_line


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
            logits = _logits(model(input_ids=ids, use_cache=False))
            total += float(functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum"))
            if progress is not None:
                progress(index / len(chunks))
    mean = total / (len(chunks) * (chunks.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return output["logits"] if isinstance(output, dict) else output[0]


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


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: its name.
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
    model: nn.Module, tokenizer: Any, names: Sequence[str], *, limit: int | None = None, batch_size: int = 8
) -> list[TaskScore]:
    """Scores of zero-shot tasks: ``simple_evaluate`` of EleutherAI's lm-evaluation-harness (``pip install
    "fasp_fx[eval]"``), with its prompts, its scoring and its own progress.

    Args:
        model: a Hugging Face causal language model, or a module called with ``input_ids`` and
            ``use_cache=False`` that returns logits, which tasks that generate text cannot have. Its mode is
            as before afterwards.
        tokenizer: the model's, as ``AutoTokenizer`` loads it.
        names: tasks, groups or tags of the harness, or YAML files that describe tasks as its own do
            (docs/evaluation.md).
        limit: only the first so many examples of each task.
        batch_size: texts per call of the model.

    Raises:
        ArgumentError: lm-eval is missing, a task is unknown, or the harness fails: the data cannot be had,
            say.
    """
    manager = task_manager(tuple(names))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel

    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ArgumentError(f"{name} is {value}; use at least 1")
    held: Any = model if isinstance(model, PreTrainedModel) else _Program(model)
    kind = "seq2seq" if getattr(held.config, "is_encoder_decoder", False) else "causal"
    try:
        with _in_evaluation(model):
            # The harness may add a padding token to the tokenizer.
            scorer = HFLM(held, backend=kind, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
            seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
            found = simple_evaluate(
                scorer, tasks=list(names), task_manager=manager, limit=limit, log_samples=False, **seeds
            )
    except tolerable(Exception) as error:  # a task runs code of its own and of the data set's
        raise ArgumentError(
            f"lm-eval cannot run {', '.join(names)}: {first_line(error)}; data come from the Hugging Face hub"
            " or its cache on disk, and a YAML file may name others"
        ) from error
    return [
        TaskScore(
            task,
            metric if chosen == "none" else f"{metric} ({chosen})",
            float(value),
            float(spread) if isinstance(spread := figures.get(f"{metric}_stderr,{chosen}"), float) else None,
            int(figures["sample_len"]),
        )
        for task, figures in found["results"].items()
        for metric, comma, chosen, value in ((*key.partition(","), value) for key, value in figures.items())
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float)
    ]


@cache
def task_manager(names: tuple[str, ...]) -> Any:
    """The harness's index of tasks, which takes seconds to read, and which files need none of.

    Raises:
        ArgumentError: lm-eval is missing, or knows no task of such a name.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ArgumentError('tasks need lm-eval, which is not installed; run: pip install "fasp_fx[eval]"')
    from lm_eval.tasks import TaskManager

    named = [name for name in names if not Path(name).is_file()]
    manager = TaskManager(include_defaults=bool(named))
    for name in named:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists all"
            raise ArgumentError(f"lm-eval knows no task '{name}', and it is no file; {hint}")
    return manager


class _Program(nn.Module):
    """What the harness asks of a Hugging Face model, around a module that was pruned with ``input_ids`` and
    ``use_cache``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.config: Any = getattr(module, "config", None)

    @property
    def device(self) -> torch.device:
        return device_of(self.module)

    def tie_weights(self) -> None:
        """Tied weights are one tensor in a program, and stay so."""

    def forward(self, input_ids: Tensor) -> Any:
        return self.module(input_ids=input_ids, use_cache=False)


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
        if progress is not None:
            progress((turn + 1) / (repeats + 1))
    return [statistics.median(taken[1:]) for taken in seconds]


__all__ = ["TaskScore", "latency", "perplexity", "tasks"]
