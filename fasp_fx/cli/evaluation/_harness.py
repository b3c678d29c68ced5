"""Zero-shot tasks through EleutherAI's lm-evaluation-harness (the ``eval`` extra), which is imported only
when a task is asked for.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...base._tolerable import tolerable
from ...errors import ArgumentError, first_line
from ._modes import in_evaluation
from ._task_file import SUFFIX, read_questions

Progress = Callable[[float], None]


def load_tasks(names: Sequence[str]) -> Any:
    """The tasks of the harness with these names; a name that ends in ``.jsonl`` is a file of one's own.

    Raises:
        ArgumentError: lm-eval is not installed, a task does not exist, or its data cannot be had.
    """
    _require()
    if not names:
        raise ArgumentError(f"no task was named; give a {SUFFIX} file or the name of a task of lm-eval")
    files = {name: _own_task(Path(name)) for name in names if name.lower().endswith(SUFFIX)}
    from lm_eval.tasks import TaskManager

    with _quiet():
        # The index of the tasks that come with the harness takes seconds to read, and a file needs none of
        # it.
        manager = TaskManager(include_defaults=len(files) < len(set(names)))
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in names:
            found = _load(manager, name, files.get(name))
            twice = sorted(set(found["tasks"]) & set(loaded["tasks"]))
            if twice:
                raise ArgumentError(
                    f"the task {twice[0]} was asked for twice; give each once, and files different names"
                )
            for part, entries in loaded.items():
                entries.update(found.get(part, {}))
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise ArgumentError(
                    f"the task {name} runs code that the model writes, or shows it images; neither is done"
                    " here, so leave it out"
                )
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)  # the harness's own default
    return loaded


def run(
    model: nn.Module,
    tokenizer: Any,
    loaded: Any,
    *,
    limit: int | None,
    batch_size: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """The results of ``lm_eval.evaluate``. The model's mode and the caller's tokenizer stay as they are.

    Raises:
        ArgumentError: a text is longer than the model takes.
    """
    from lm_eval import evaluate

    with in_evaluation(model), _quiet(progress):
        return evaluate(_lm(model, tokenizer, batch_size), loaded, limit=limit, log_samples=False)


def _own_task(file: Path) -> dict[str, Any]:
    questions = read_questions(file)

    def data(**metadata: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(questions)}

    metrics = ("acc", "acc_norm", "acc_bytes")
    return {
        "task": file.name,
        "custom_dataset": data,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics
        ],
    }


def _load(manager: Any, name: str, own: dict[str, Any] | None) -> Any:
    if own is not None:
        return manager.load([own])
    if not Path(name).is_file() and name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = (
            f"; did you mean {' or '.join(near)}?"
            if near
            else f"; give a {SUFFIX} file, or one of the names that `lm-eval ls tasks` lists"
        )
        raise ArgumentError(f"lm-eval knows no task '{name}'{hint}")
    try:
        return manager.load([name])
    except tolerable(Exception) as error:  # a task runs code of its own and of the data set's
        raise ArgumentError(
            f"the data of the task '{name}' cannot be had: {first_line(error)}; it comes from the Hugging"
            f" Face hub, so connect once to fill the cache, or give a {SUFFIX} file"
        ) from error


def _lm(model: nn.Module, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel

    class Scorer(HFLM):
        """Refuses what the harness would cut: a text that loses its beginning is another question."""

        def _loglikelihood_tokens(
            self, requests: list[Any], *rest: Any, **options: Any
        ) -> list[tuple[float, bool]]:
            for (context, continuation), start, end in (
                (texts or ("", ""), *tokens) for texts, *tokens in requests
            ):
                length = len(start) + len(end)
                if length > self.max_length + 1:  # the last token is only predicted
                    raise ArgumentError(
                        f"the text '{_short(context + continuation)}' has {length} tokens, more than the"
                        f" {self.max_length} positions of the model; shorten it or leave the task out"
                    )
                if not end:
                    raise ArgumentError(
                        f"the answer '{_short(continuation)}' has no token of its own after"
                        f" '{_short(context)}', so it has no likelihood"
                    )
            return super()._loglikelihood_tokens(requests, *rest, **options)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            if not hasattr(self.model, "generate"):
                raise ArgumentError(
                    "the task lets the model generate text, which a pruned program without a cache does not;"
                    " leave it out"
                )
            return super().generate_until(requests, disable_tqdm)

    held: Any = model if isinstance(model, PreTrainedModel) else _Program(model)
    kind = "seq2seq" if getattr(held.config, "is_encoder_decoder", False) else "causal"
    try:
        # The harness may add a padding token.
        return Scorer(held, backend=kind, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    except AssertionError as error:
        raise ArgumentError(
            f"lm-eval takes no {type(tokenizer).__name__}; give the tokenizer that AutoTokenizer loads"
        ) from error


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
        from ...base._device import device_of

        return device_of(self.module)

    def tie_weights(self) -> None:
        """Tied weights are one tensor in a program, and stay so."""

    def forward(self, input_ids: Tensor) -> Any:
        return self.module(input_ids=input_ids, use_cache=False)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _require() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ArgumentError('tasks need lm-eval, which is not installed; run: pip install "fasp_fx[eval]"')


class _Bar:
    """Stands for tqdm: draws nothing, and tells ``report`` the fraction done where the harness counts by
    hand.
    """

    report: Progress | None = None

    def __init__(self, items: Iterable[Any] = (), *, total: int | None = None, **options: Any) -> None:
        self.items, self.total, self.done = items, total, 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def update(self, count: int = 1) -> None:
        self.done += count
        if self.report is not None and self.total:
            self.report(self.done / self.total)

    def close(self) -> None:
        """Nothing is drawn."""


@contextlib.contextmanager
def _quiet(progress: Progress | None = None) -> Iterator[None]:
    """The harness draws bars of its own and writes warnings, some of which no argument turns off."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    bar = type("Bar", (_Bar,), {"report": None if progress is None else staticmethod(progress)})
    modules: list[Any] = [lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface]
    originals = [module.tqdm for module in modules]
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    disabled = datasets.are_progress_bars_disabled()
    try:
        for module in modules:
            module.tqdm = bar
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        yield
    finally:
        for module, original in zip(modules, originals):
            module.tqdm = original
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if not disabled:
            datasets.enable_progress_bars()


__all__ = ["load_tasks", "run"]
