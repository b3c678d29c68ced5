"""What follows the choice: recovering, measuring, and saying what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from ..hf import Pruned
from ..pruning.report import Figure, counted
from ..training.recovery import DistillationConfig, distil
from . import _tables
from ._console import Stages, say
from ._texts import Texts
from .evaluation import latency, perplexity

#: tokens of a step of training, and of each text of it, as far as whole chunks allow: for as many tokens,
#: short texts teach as much as long ones, and attention sees less (docs/benchmarks.md)
STEP, TEXT = 1024, 256


def recover(
    result: Pruned,
    dense: Any,
    chunks: Tensor,
    stages: Stages,
    config: DistillationConfig,
    checkpoint: Path | None = None,
) -> Pruned:
    """Train a pruned model on chunks ``[chunks, length]`` towards the dense one."""
    count, length = chunks.shape
    stages.begin(f"recovering on {count} x {length} tokens", measured=True)
    return distil(
        result, dense, training_steps(chunks), config=config, checkpoint=checkpoint, progress=stages.update
    )


def training_steps(chunks: Tensor) -> tuple[Tensor, ...]:
    """Cut chunks ``[chunks, length]`` into equal texts and put these together to steps ``[texts, tokens]``,
    of which there are two at least: one is held out.
    """
    count, length = chunks.shape
    parts = -(-length // TEXT)
    texts = chunks.reshape(count * parts, -1) if length % parts == 0 else chunks
    together = max(1, min(STEP // texts.shape[1], len(texts) // 2))
    return texts.split(together)


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
    stages.end()
    return (
        Figure(f"milliseconds for one chunk of {chunks.shape[1]} tokens", times[0] * 1e3, times[1] * 1e3, 1),
        Figure(texts.label, values[0], values[1], 3),
    )


def show(result: Pruned, out: Path, console: Console) -> None:
    """Print what was saved in a folder: figures, notes, and how to load it."""
    report = result.report
    cache = (
        [] if report.cache is None else [Figure("bytes of cache per token of one sequence", *report.cache)]
    )
    console.print(
        _tables.figures_table(
            [
                Figure("parameters", *report.parameters),
                Figure("bytes", *report.bytes),
                *cache,
                *report.figures,
            ]
        )
    )
    asked = "" if report.requested is None else f" (asked for {report.requested:.2%})"
    say(console, f"removed {report.sparsity:.2%} of the linear weights of {counted(report.include)}{asked}")
    for spent in report.budgets:
        say(console, f"budget: {spent}")
    if report.recovery is not None:
        say(console, f"recovered: {report.recovery}")
    for note in (*(report.recovery.notes if report.recovery is not None else ()), *report.notes):
        say(console, f"note: {note}")
    say(console, f"saved in {out}; load it with")
    for line in result.loading(out):
        say(console, f"  {line}")


__all__ = ["measure", "recover", "show"]
