"""What follows the choice: recovering, measuring, saving, and saying what came of it. ``fasp-fx recover``
does so later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..hf import Pruned
from ..pruning.report import Figure, counted
from ..training.recovery import DistillationConfig, distil
from . import _models
from ._console import Stages, console, say
from ._paths import check_target
from ._tables import figures_table
from ._text import Texts
from .evaluation import latency, perplexity

#: tokens of a step of training, and of each text of it, as far as whole chunks allow: for as many tokens,
#: short texts teach as much as long ones, and attention sees less (docs/benchmarks.md)
STEP, TEXT = 1024, 256


def recover(result: Pruned, dense: Any, chunks: Tensor, stages: Stages, **options: Any) -> Pruned:
    """Train a pruned model on chunks ``[chunks, length]`` towards the dense one.

    Args:
        options: for :func:`fasp_fx.distil`.
    """
    stages.begin(f"recovering on {chunks.shape[0]} x {chunks.shape[1]} tokens", measured=True)
    return distil(result, dense, training_steps(chunks), progress=stages.update, **options)


def training_steps(chunks: Tensor) -> tuple[Tensor, ...]:
    """Cut chunks ``[chunks, length]`` into equal texts and put these together to steps ``[texts, tokens]``,
    of which there are two at least: one is held out.
    """
    count, length = chunks.shape
    parts = -(-length // TEXT)
    texts = chunks.reshape(count * parts, -1) if length % parts == 0 else chunks
    return texts.split(max(1, min(STEP // texts.shape[1], len(texts) // 2)))


def measure(dense: Any, result: Pruned, texts: Texts, stages: Stages) -> tuple[Figure, ...]:
    """Latency and perplexity of the dense and of the pruned model."""
    chunks = texts.evaluation
    assert chunks is not None
    stages.begin("measuring latency", measured=True)
    times = latency([dense, result.model], chunks[:1], progress=stages.update)
    values = []
    for name, module in (("dense", dense), ("pruned", result.model)):
        stages.begin(f"measuring perplexity of the {name} model", measured=True)
        values.append(perplexity(module, chunks, progress=stages.update))
    return (
        Figure(f"milliseconds for one chunk of {chunks.shape[1]} tokens", times[0] * 1e3, times[1] * 1e3, 1),
        Figure(texts.label, values[0], values[1], 3),
    )


def save(result: Pruned, out: Path, overwrite: bool, stages: Stages) -> None:
    """Write a folder, whole or not at all."""
    stages.begin("saving")
    result.save_pretrained(out, overwrite=overwrite)
    stages.end()


def show(result: Pruned, out: Path) -> None:
    """Print what was saved in a folder: figures, notes, and how to load it."""
    report = result.report
    name = "bytes of cache per token of one sequence"
    cache = () if report.cache is None else (Figure(name, *report.cache),)
    sizes = (Figure("parameters", *report.parameters), Figure("bytes", *report.bytes))
    console().print(figures_table([*sizes, *cache, *report.figures]))
    asked = "" if report.requested is None else f" (asked for {report.requested:.2%})"
    recovery = report.recovery
    for line in (
        f"removed {report.sparsity:.2%} of the linear weights of {counted(report.include)}{asked}",
        *(f"budget: {spent}" for spent in report.budgets),
        *(() if recovery is None else (f"recovered: {recovery}",)),
        *(f"note: {note}" for note in (*(recovery.notes if recovery is not None else ()), *report.notes)),
        f"saved in {out}; load it with",
        *(f"  {line}" for line in result.loading(out)),
    ):
        say(line)


def run(
    folder: str,
    dense: str,
    out: Path,
    texts: Texts,
    config: DistillationConfig,
    checkpoint: Path | None,
    device: str | None,
    overwrite: bool,
    stages: Stages,
) -> None:
    """Do what the command says, as its help describes it.

    Raises:
        FaspError: it cannot be met; nothing is written then but the checkpoint.
    """
    texts.check("--data")
    if _models.is_saved(dense):
        raise ArgumentError(
            f"--dense '{dense}' is a model that was pruned; give the dense one that it was made of"
        )
    plain = not _models.is_saved(folder)
    check_target(out, overwrite=overwrite, plain=plain, checkpoint=checkpoint)
    _models.quieten()
    where = _models.find_device(device)
    source = _models.Source.of(dense)
    stages.begin("loading the models and the text")
    result = _models.load_pruned(Path(folder), where)
    texts.read(result.tokenizer, least=2)
    dtype = next(parameter.dtype for parameter in result.model.parameters() if parameter.is_floating_point())
    teacher = _models.load_model(source, dtype=str(dtype).removeprefix("torch."), device=where)
    _models.check_length(teacher, texts.length)
    texts.check_against(teacher, result.tokenizer)
    torch.manual_seed(texts.seed)
    texts.write(teacher, result.tokenizer, stages)
    assert texts.used is not None
    result = recover(result, teacher, texts.used, stages, config=config, checkpoint=checkpoint)
    try:
        result = result.with_report(figures=measure(teacher, result, texts, stages))
    finally:  # what was learned is kept even if it could not be measured
        save(result, out, overwrite, stages)
    show(result, out)


