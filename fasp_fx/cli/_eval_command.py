"""``fasp-fx eval``: perplexity and zero-shot tasks of one model, or of several side by side."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from ..errors import ArgumentError
from . import _models, _tables, _text
from ._arguments import check_path, check_text
from ._checkpoint import check_tokens
from ._console import Stages, say
from ._saved import is_saved, load_saved
from .evaluation import TaskScore, _harness, perplexity, score_loaded


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    models: tuple[str, ...]
    text: Path | None
    tasks: tuple[str, ...]
    length: int
    chunks: str | None
    limit: int | None
    batch_size: int
    as_json: bool
    device: str | None
    dtype: str

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            FaspError: says which option and why.
        """
        if self.text is None and not self.tasks:
            raise ArgumentError(
                "there is nothing to measure; give a text file with --text, or a task with --task"
            )
        if self.length < 2:
            raise ArgumentError(f"--length {self.length} leaves nothing to predict; use at least 2")
        for option, value in (("--limit", self.limit), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise ArgumentError(f"{option} {value} is too small; use at least 1")
        check_text("--text", self.text)
        for task in self.tasks:
            check_path("--task", task)
        _text.parse_slice(self.chunks)
        for index, model in enumerate(self.models):
            if model in self.models[:index]:
                raise ArgumentError(f"the model '{model}' is named twice; name each once")
            check_path("the model", model)
            if is_saved(model):
                if self.dtype != "auto":
                    raise ArgumentError(
                        "--dtype does not apply to a pruned model: it was chosen when the model was pruned"
                    )
            else:
                _models.Source.of(model)


@dataclass
class Measured:
    """What was found for one model; ``chunks`` are the tokens that perplexity was measured on, ``[chunks,
    length]``, ``first`` the number of the first.
    """

    name: str
    perplexity: float | None = None
    chunks: Tensor | None = None
    first: int = 0
    scores: Sequence[TaskScore] = ()


def run(request: Request, stages: Stages, console: Console) -> None:
    """Do what the request says.

    Raises:
        FaspError: it cannot be met.
    """
    request.check()
    _models.quieten()
    device = _models.find_device(request.device)
    loaded = None
    if request.tasks:
        stages.begin("reading the tasks")
        loaded = _harness.load_tasks(request.tasks)
    measured = [_measure(request, name, loaded, device, stages) for name in request.models]
    stages.end()
    notes = _notes(measured)
    if request.as_json:
        typer.echo(json.dumps(_as_data(request, measured, notes), allow_nan=False))
    elif len(measured) == 1 and not request.tasks:
        typer.echo(f"perplexity {measured[0].perplexity:.4f} on {_where(request, measured[0])}")
    else:
        console.print(_tables.scores_table(_short_names(request.models), _rows(request, measured)))
        for note in notes:
            say(console, f"note: {note}")


def _measure(request: Request, name: str, loaded: Any, device: torch.device, stages: Stages) -> Measured:
    """One model is in memory at a time."""
    found = Measured(name)
    of = f" of {name}" if len(request.models) > 1 else ""
    stages.begin(f"loading {name}" if of else "loading the model")
    module, tokenizer = _load(request, name, device)
    if request.text is not None:
        stages.begin("reading the text")
        chunks = _text.read_chunks(request.text, tokenizer, request.length)
        chosen = _text.parse_range(request.chunks, len(chunks))
        _models.check_length(module, request.length)
        check_tokens(module, chunks, f"'{request.text}'")
        found.chunks, found.first = chunks[chosen.start : chosen.stop], chosen.start
        stages.begin(f"measuring perplexity{of} on {len(chosen)} chunks", measured=True)
        found.perplexity = perplexity(module, found.chunks, progress=stages.update)
    if loaded is not None:
        stages.begin(f"scoring the tasks{of}" if of else "scoring the tasks", measured=True)
        found.scores = score_loaded(
            module,
            tokenizer,
            loaded,
            limit=request.limit,
            batch_size=request.batch_size,
            progress=stages.update,
        )
    return found


def _load(request: Request, name: str, device: torch.device) -> tuple[nn.Module, Any]:
    if is_saved(name):
        return load_saved(Path(name), device)
    source = _models.Source.of(name)
    tokenizer = _models.load_tokenizer(source)
    return _models.load_model(source, dtype=request.dtype, device=device), tokenizer


def _where(request: Request, one: Measured) -> str:
    assert request.text is not None
    assert one.chunks is not None
    return (
        f"chunks {one.first} to {one.first + len(one.chunks) - 1} of {request.text.name} ({len(one.chunks)} x"
        f" {request.length} tokens)"
    )


def _notes(measured: Sequence[Measured]) -> list[str]:
    first = measured[0].chunks
    if first is None or all(one.chunks is not None and torch.equal(one.chunks, first) for one in measured):
        return []
    return ["the models cut the text into different tokens, so their perplexities cannot be compared"]


def _rows(request: Request, measured: Sequence[Measured]) -> list[tuple[str, list[str], str]]:
    rows = []
    if request.text is not None:
        values = [one.perplexity for one in measured if one.perplexity is not None]
        rows.append(
            (
                f"perplexity on {_where(request, measured[0])}",
                [f"{value:.4f}" for value in values],
                f"{values[-1] / values[0] - 1:+.1%}",
            )
        )
    for scores in zip(*(one.scores for one in measured), strict=True):
        cells = [
            f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
            for score in scores
        ]
        rows.append(
            (
                f"{scores[0].task}: {scores[0].metric} of {scores[0].examples} examples",
                cells,
                f"{scores[-1].value - scores[0].value:+.4f}",
            )
        )
    return rows


def _as_data(request: Request, measured: Sequence[Measured], notes: list[str]) -> dict[str, Any]:
    """Everything as plain data; what is not finite is null."""
    text = None if request.text is None else {"file": str(request.text), "length": request.length}
    models = []
    for one in measured:
        entry: dict[str, Any] = {"model": one.name}
        if one.chunks is not None and one.perplexity is not None:
            entry |= {
                "perplexity": _finite(one.perplexity),
                "chunks": [one.first, one.first + len(one.chunks)],
            }
        if request.tasks:
            entry["tasks"] = [
                asdict(score) | {"value": _finite(score.value), "stderr": _finite(score.stderr)}
                for score in one.scores
            ]
        models.append(entry)
    return {"text": text, "limit": request.limit, "models": models, "notes": notes}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _short_names(models: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole of it where two would be called the same."""
    short = [os.path.basename(os.path.normpath(model)) for model in models]
    return [model if short.count(name) > 1 else name for model, name in zip(models, short)]


__all__ = ["Request", "run"]
