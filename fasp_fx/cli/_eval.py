"""``fasp-fx eval``: perplexity and zero-shot tasks of one model, or of several side by side."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from ..errors import ArgumentError
from . import _models
from ._console import Stages, console, say
from ._paths import check_path, check_text
from ._tables import table
from ._text import read_chunks
from .evaluation import TaskScore, perplexity, task_manager, tasks


@dataclass
class Measured:
    """What was found for one model; ``chunks`` are the tokens that perplexity was measured on, ``[chunks,
    length]``, ``first`` the number of the first.
    """

    model: str
    perplexity: float | None = None
    chunks: Tensor | None = None
    first: int = 0
    scores: Sequence[TaskScore] = ()


def run(
    models: Sequence[str],
    text: Path | None,
    task: Sequence[str],
    length: int,
    chunks: str | None,
    limit: int | None,
    batch_size: int,
    as_json: bool,
    device: str | None,
    dtype: str,
    stages: Stages,
) -> None:
    """Do what the command says, as its help describes it.

    Raises:
        FaspError: it cannot be met.
    """
    if text is None and not task:
        raise ArgumentError(
            "there is nothing to measure; give a text file with --text, or a task with --task"
        )
    check_text("--text", text)
    for name in task:
        check_path("--task", name)
    chosen = read_range(chunks)
    for index, model in enumerate(models):
        if model in models[:index]:
            raise ArgumentError(f"the model '{model}' is named twice; name each once")
        if not _models.is_saved(model):
            _models.Source.of(model)
        elif dtype != "auto":
            raise ArgumentError(
                "--dtype does not apply to a pruned model: it was chosen when the model was pruned"
            )
    _models.quieten()
    where = _models.find_device(device)
    if task:
        stages.begin("reading the tasks")
        task_manager(tuple(task))
    measured = []
    for model in models:  # one is in memory at a time
        stages.begin(f"loading {model}")
        if _models.is_saved(model):
            pruned = _models.load_pruned(Path(model), where)
            module, tokenizer = pruned.model, pruned.tokenizer
        else:
            source = _models.Source.of(model)
            tokenizer = _models.load_tokenizer(source)
            module = _models.load_model(source, dtype=dtype, device=where)
        found = Measured(model)
        if text is not None:
            stages.begin("reading the text")
            tokens = read_chunks(text, tokenizer, length)
            numbers = range(len(tokens))[chosen]
            if not numbers:
                raise ArgumentError(
                    f"the range {chunks} holds none of the {len(tokens)} chunks of the text; chunks are 0 to"
                    f" {len(tokens) - 1}"
                )
            found.chunks, found.first = tokens[chosen], numbers[0]
            _models.check_length(module, length)
            _models.check_tokens(module, tokens, f"'{text}'")
            stages.begin(f"measuring perplexity of {model} on {len(numbers)} chunks", measured=True)
            found.perplexity = perplexity(module, found.chunks, progress=stages.update)
        if task:
            stages.begin(f"scoring the tasks of {model}")
            stages.end()  # lm-eval shows its own progress
            found.scores = tasks(module, tokenizer, task, limit=limit, batch_size=batch_size)
        measured.append(found)
    stages.end()
    _show(measured, text, length, limit, as_json=as_json)


def read_range(text: str | None) -> slice:
    """``"a:b"``, ``"a:"``, ``":b"`` or ``None`` as the chunks to choose.

    Raises:
        ArgumentError: it does not parse.
    """
    found = re.fullmatch(r"(-?\d*):(-?\d*)", ":" if text is None else text)
    if found is None or "-" in found.groups():
        raise ArgumentError(f"'{text}' is not a range of chunks; write first:last+1, for example 100:140")
    return slice(*(int(end) if end else None for end in found.groups()))


def _show(
    measured: Sequence[Measured], text: Path | None, length: int, limit: int | None, *, as_json: bool
) -> None:
    first = measured[0]
    where, notes = "", []
    if text is not None and first.chunks is not None:
        count = len(first.chunks)
        last = first.first + count - 1
        where = f"chunks {first.first} to {last} of {text.name} ({count} x {length} tokens)"
        if not all(one.chunks is not None and torch.equal(one.chunks, first.chunks) for one in measured):
            notes.append(
                "the models cut the text into different tokens, so their perplexities cannot be compared"
            )
    if as_json:
        data = {
            "text": None if text is None else {"file": str(text), "length": length},
            "limit": limit,
            "models": [
                {"model": one.model}
                | ({} if one.chunks is None else {"perplexity": _finite(one.perplexity)})
                | ({} if one.chunks is None else {"chunks": [one.first, one.first + len(one.chunks)]})
                | {"tasks": [{name: _finite(v) for name, v in asdict(score).items()} for score in one.scores]}
                for one in measured
            ],
            "notes": notes,
        }
        typer.echo(json.dumps(data, allow_nan=False))
        return
    rows: list[tuple[str, str, list[str], str]] = []
    if where:
        values = [one.perplexity or math.nan for one in measured]
        change = f"{values[-1] / values[0] - 1:+.1%}"
        rows.append(("perplexity", where, [f"{value:.4f}" for value in values], change))
    for scores in zip(*(one.scores for one in measured), strict=True):
        cells = [f"{s.value:.4f}" + ("" if s.stderr is None else f" ± {s.stderr:.4f}") for s in scores]
        change = f"{scores[-1].value - scores[0].value:+.4f}"
        what, of = f"{scores[0].task} {scores[0].metric}", f"{scores[0].examples} examples"
        rows.append((what, of, cells, change))
    if len(measured) == 1:
        for what, of, (value,), _ in rows:
            say(f"{what} {value} on {of}")
    else:
        names = [Path(one.model).name or one.model for one in measured]
        shown = [one.model if names.count(name) > 1 else name for one, name in zip(measured, names)]
        headings = ["", *shown, "change" if len(measured) == 2 else "first to last"]
        lines = [[f"{what} on {of}", *cells, change] for what, of, cells, change in rows]
        console().print(table(headings, lines))
    for note in notes:
        say(f"note: {note}")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["read_range", "run"]
