"""``fasp-fx eval``: perplexity and zero-shot tasks of one model, or of several side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
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
from .evaluation import perplexity, task_manager, tasks


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
    entries: list[dict[str, Any]] = []
    texts: list[Tensor] = []
    for model in models:  # one is in memory at a time
        stages.begin(f"loading {model}")
        if _models.is_saved(model):
            pruned = _models.load_pruned(Path(model), where)
            module, tokenizer = pruned.model, pruned.tokenizer
        else:
            source = _models.Source.of(model)
            tokenizer = _models.load_tokenizer(source)
            module = _models.load_model(source, dtype=dtype, device=where)
        entry: dict[str, Any] = {"model": model}
        if text is not None:
            stages.begin("reading the text")
            tokens = read_chunks(text, tokenizer, length)
            numbers = range(len(tokens))[chosen]
            if not numbers:
                raise ArgumentError(
                    f"the range {chunks} holds none of the {len(tokens)} chunks of the text; chunks are 0 to"
                    f" {len(tokens) - 1}"
                )
            texts.append(tokens[chosen])
            _models.check_length(module, length)
            _models.check_tokens(module, tokens, f"'{text}'")
            stages.begin(f"measuring perplexity of {model} on {len(numbers)} chunks", measured=True)
            entry["perplexity"] = perplexity(module, texts[-1], progress=stages.update)
            entry["chunks"] = [numbers.start, numbers.stop]
        if task:
            stages.begin(f"scoring the tasks of {model}")
            stages.end()  # lm-eval shows its own progress
            scores = tasks(module, tokenizer, task, limit=limit, batch_size=batch_size)
            entry["tasks"] = [asdict(score) for score in scores]
        entries.append(entry)
    stages.end()
    different = "the models cut the text into different tokens, so their perplexities cannot be compared"
    notes = [] if all(torch.equal(one, texts[0]) for one in texts) else [different]
    if as_json:
        source_of = None if text is None else {"file": str(text), "length": length}
        data = {"text": source_of, "limit": limit, "models": entries, "notes": notes}
        # What is infinite or no number becomes nothing, since JSON cannot say it.
        typer.echo(json.dumps(json.loads(json.dumps(data), parse_constant=lambda name: None)))
        return
    rows = _rows(entries, "" if text is None else f"of {text.name}", length)
    if len(models) == 1:
        for what, value, _ in rows:
            say(what.replace(" on ", f" {value} on ", 1))
    else:
        names = [Path(model).name or model for model in models]
        shown = [model if names.count(name) > 1 else name for model, name in zip(models, names)]
        console().print(table(["", *shown, "change" if len(models) == 2 else "first to last"], rows))
    for note in notes:
        say(f"note: {note}")


def read_range(text: str | None) -> slice:
    """``"a:b"``, ``"a:"``, ``":b"`` or ``None`` as the chunks to choose.

    Raises:
        ArgumentError: it does not parse.
    """
    found = re.fullmatch(r"(-?\d*):(-?\d*)", ":" if text is None else text)
    if found is None or "-" in found.groups():
        raise ArgumentError(f"'{text}' is not a range of chunks; write first:last+1, for example 100:140")
    return slice(*(int(end) if end else None for end in found.groups()))


def _rows(entries: Sequence[dict[str, Any]], of: str, length: int) -> Iterator[list[str]]:
    """What was measured on what, its value for each model, and how the last differs from the first."""
    if "chunks" in entries[0]:
        first, stop = entries[0]["chunks"]
        values = [entry["perplexity"] for entry in entries]
        what = f"perplexity on chunks {first} to {stop - 1} {of} ({stop - first} x {length} tokens)"
        yield [what, *(f"{value:.4f}" for value in values), f"{values[-1] / values[0] - 1:+.1%}"]
    for scores in zip(*(entry.get("tasks", ()) for entry in entries), strict=True):
        one = scores[0]
        errors = (f" ± {score['stderr']:.4f}" if score["stderr"] is not None else "" for score in scores)
        yield [
            f"{one['task']} {one['metric']} on {one['examples']} examples",
            *(f"{score['value']:.4f}{error}" for score, error in zip(scores, errors)),
            f"{scores[-1]['value'] - one['value']:+.4f}",
        ]
