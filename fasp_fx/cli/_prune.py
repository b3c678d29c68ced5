"""``fasp-fx prune`` and ``fasp-fx recover``: text, pruning, recovering, measuring, saving."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasp_fx.allocation import Bytes
from fasp_fx.analysis import Analysis
from fasp_fx.base import offload, process
from fasp_fx.errors import ArgumentError, StoreError
from fasp_fx.hf import (
    FORMATS,
    KIND,
    Judged,
    Pruned,
    convert,
    loading_of,
    prune,
    pruned_already,
    sweep,
)
from fasp_fx.pruning import (
    Figure,
    FormatName,
    Method,
    PruningConfig,
    Sweep,
    expected_sparsity,
    with_agreement,
)
from fasp_fx.storage import new_save, refuse_other
from fasp_fx.training import DistillationConfig, distil

from . import _models
from ._console import CAPTURING, Stages, console, groups_table, say, show_figures
from ._devices import find_device, together
from ._models import Texts

_GIB = 2**30

#: tokens of a step of training, and of each text of it, as far as whole chunks allow: for as many tokens,
#: short texts teach as much as long ones, and attention sees less (docs/benchmarks.md)
STEP, TEXT = 1024, 256


def recover(
    result: Pruned,
    dense: Any,
    texts: Texts,
    config: DistillationConfig,
    stages: Stages,
    checkpoint: Path | None = None,
) -> Pruned:
    """Train a pruned model on text towards the dense one."""
    steps = {name: training_steps(chunks) for name, chunks in texts.training.items()}
    tokens = sum(chunks.numel() for chunks in texts.training.values())
    often = f", {config.epochs} times" if config.epochs > 1 else ""
    stages.begin(f"recovering on {tokens:,} tokens of {texts.named}{often}")
    return distil(result, dense, steps, config=config, checkpoint=checkpoint, progress=stages.update)


def training_steps(chunks: Tensor) -> tuple[Tensor, ...]:
    """Cut chunks ``[chunks, length]`` into equal texts and put these together to steps ``[texts, tokens]``,
    of which there are two at least: one is held out.
    """
    count, length = chunks.shape
    parts = -(-length // TEXT)
    texts = chunks.reshape(count * parts, -1) if length % parts == 0 else chunks
    return texts.split(max(1, min(STEP // texts.shape[1], len(texts) // 2)))


def measured(dense: Any, result: Pruned, texts: Texts, stages: Stages) -> Pruned:
    """The same, with how it and the dense model predict the same text in its report; both run once."""
    stages.begin("measuring how far both models agree")
    rows = {
        label: [{"input_ids": chunk[None], "use_cache": False} for chunk in chunks]
        for label, chunks in texts.evaluation.items()
    }
    models = Judged(dense), Judged(result.model)
    result = with_agreement(result, *models, rows)
    figures, first = [], 0
    for label, some in rows.items() if result.report.agreement else ():
        before, after = (model.perplexity(first, len(some)) for model in models)
        figures.append(Figure(f"perplexity on {label}", before, after, 3))
        first += len(some)
    return result.with_report(figures=tuple(figures))


def show(result: Pruned, out: Path | None) -> None:
    """Print figures and notes, and how what was saved in a folder, if it was, is loaded."""
    show_figures(result.report)
    if out is None:
        say("nothing was written")
        return
    say(f"saved in {out}; load it with")
    for line in loading_of(result.model, out, str(out)).splitlines():
        say(f"  {line}")


@dataclass(frozen=True)
class Job:
    """What a command writes, and how it works.

    Attributes:
        out: the folder to write; ``None``: none.
        overwrite: whether an earlier save there is replaced.
        format: of the files; ``None``: as for :func:`fasp_fx.hf.prune`.
        device: ``None``: the accelerator if there is one.
        dtype: of the dense model.
        checkpoint: the folder that keeps the state of the work, if any.
        scratch: where the weights are kept; ``None``: in memory.
    """

    out: Path | None
    overwrite: bool
    format: FormatName | None = None
    device: str | None = None
    dtype: str = "auto"
    checkpoint: Path | None = None
    scratch: Path | None = None

    def check(self) -> None:
        """Refuse folders that could not be written later.

        Raises:
            StoreError: something is there that must not be replaced, or the folder cannot be made.
            ArgumentError: one of them lies in the other.
        """
        out, checkpoint = self.out and self.out.absolute(), self.checkpoint
        if out is not None:
            with new_save(out, KIND, overwrite=self.overwrite, keep=False):
                pass
        if checkpoint is not None:
            refuse_other(checkpoint, "--checkpoint")
            if out in (checkpoint.absolute(), *checkpoint.absolute().parents):
                raise ArgumentError(
                    f"--checkpoint '{checkpoint}' lies in --out '{self.out}'; give another folder"
                )

    def check_room(self, model: Any, format: str | None, kept: float = 1.0) -> None:
        """Refuse a folder on a disk that has no room for a model.

        Args:
            format: of its files.
            kept: the part of the model's bytes that will be left at least.

        Raises:
            StoreError: says how many bytes it takes, and how many are free.
        """
        if self.out is None:
            return
        files = {None, FORMATS[format].stored} if format else {None}  # a GGUF file comes besides
        needed = kept * sum(Bytes(1.0, stored).held(model.parameters()) for stored in files)
        there = next(folder for folder in self.out.absolute().parents if folder.exists())
        free = shutil.disk_usage(there).free
        if needed > free:
            raise StoreError(
                f"'{self.out}' will take {needed / _GIB:.3g} GiB at least, and {free / _GIB:.3g} GiB are free"
                " there; free some, or give another --out"
            )

    @contextmanager
    def saving(self, stages: Stages, versions: list[Pruned]) -> Iterator[None]:
        """Save the last version, whole or not at all, even if it could not be improved or measured."""
        try:
            yield
        finally:
            if self.out is not None:
                stages.begin("saving")
                versions[-1].save_pretrained(self.out, overwrite=self.overwrite)
            stages.end()
        show(versions[-1], self.out)


def recover_and_save(
    folder: Path, dense: str, job: Job, texts: Texts, config: DistillationConfig, stages: Stages
) -> None:
    """Do what the command says, as its help describes it.

    Raises:
        FaspError: it cannot be met; nothing is written then but the checkpoint.
    """
    job.check()
    device = find_device(job.device)
    stages.begin("loading the models and the text")
    versions = [_models.load_pruned(folder, device)]
    tokenizer, pruned = versions[0].tokenizer, versions[0].model
    job.check_room(pruned, versions[0].format)
    texts.read(tokenizer)
    teacher = _models.load_model(dense, dtype=str(pruned.dtype).removeprefix("torch."), device=device)
    texts.check_against(teacher)
    torch.manual_seed(texts.seed)
    texts.write(teacher, tokenizer, stages)
    versions.append(recover(versions[0], teacher, texts, config, stages, job.checkpoint))
    with job.saving(stages, versions):
        versions.append(measured(teacher, versions[-1], texts, stages))


def convert_and_save(folder: Path, format: FormatName, job: Job, stages: Stages) -> None:
    """Do what the command says, as its help describes it.

    Raises:
        FaspError: it cannot be met; nothing is written then.
    """
    job.check()
    stages.begin("loading the model")
    pruned = _models.load_pruned(folder, torch.device("cpu"))
    job.check_room(pruned.model, format)
    stages.begin("converting")
    with job.saving(stages, [convert(pruned, format)]):
        pass


def swept(model: str, texts: Texts, device: torch.device, stages: Stages, how: dict[str, Any]) -> Sweep:
    """What :func:`fasp_fx.hf.sweep` finds of a model, on text."""
    if _models.is_saved(model):
        raise pruned_already(f"'{model}'")
    stages.begin("loading the model and the text")
    tokenizer, dense = _models.load_tokenizer(model), _models.load_model(model, device=device)
    texts.read(tokenizer)
    texts.check_against(dense)
    texts.write(dense, tokenizer, stages)
    stages.begin("sweeping")
    return sweep(dense, calibration=_batches(texts, device), progress=stages.update, **how)


def run(
    model: str,
    job: Job,
    config: PruningConfig,
    texts: Texts,
    training: DistillationConfig | None,
    stages: Stages,
) -> None:
    """Do what the command says, as its help describes it.

    Args:
        config: how to prune.
        texts: what to calibrate and to measure on.
        training: what follows, if anything; how often each text is trained on, the text says.

    Raises:
        FaspError: it cannot be met; nothing is written then.
    """
    if training is not None and job.scratch is not None:
        raise ArgumentError(
            "--recover trains all weights at once, which --stream avoids to hold; run fasp-fx recover"
            " afterwards, or leave one out"
        )
    job.check()
    if _models.is_saved(model):
        raise pruned_already(f"'{model}'")
    device = find_device(job.device)
    torch.manual_seed(texts.seed)
    stages.begin("loading the tokenizer and the text")
    tokenizer = _models.load_tokenizer(model)
    texts.read(tokenizer)
    with offload(job.scratch, device=device) if job.scratch is not None else nullcontext() as scratch:
        stages.begin("loading the model")
        dense = _models.load_model(
            model, dtype=job.dtype, device=device if scratch is None else "cpu", scratch=scratch
        )
        texts.check_against(dense)
        if needs_data := Method.of(config).needs_data:
            texts.write(dense, tokenizer, stages)
        used = texts if needs_data else None
        with together(device) as group:
            versions = [_pruned(dense, tokenizer, used, job, stages, config=config, group=group)]
        if process("RANK", 0):  # all processes have the same
            return
        with job.saving(stages, versions):
            texts.write(dense, tokenizer, stages, to_use=training is not None)
            if training is not None:
                training = replace(training, epochs=texts.passes)
                versions.append(recover(versions[0], dense, texts, training, stages))
            versions.append(measured(dense, versions[-1], texts, stages))


def _batches(texts: Texts, device: torch.device) -> dict[str, list[dict[str, Tensor]]]:
    """The text to use as batches, by their sources."""
    return {
        name: [{"input_ids": chunk[None].to(device)} for chunk in chunks]
        for name, chunks in texts.used.items()
    }


def _pruned(
    model: Any, tokenizer: Any, texts: Texts | None, job: Job, stages: Stages, **options: Any
) -> Pruned:
    """What :func:`fasp_fx.hf.prune` gives, with stages for what it does, if there is room for it."""
    batches = None if texts is None else _batches(texts, next(model.parameters()).device)

    def show_groups(analysis: Analysis) -> None:
        stages.end()
        job.check_room(model, job.format, 1 - expected_sparsity(options["config"], analysis))
        console().print(groups_table(analysis))
        if texts is not None:
            tokens = sum(chunks.numel() for chunks in texts.used.values())
            stages.begin(f"calibrating on {tokens:,} tokens of {texts.named}")

    def calibrated(fraction: float) -> None:
        stages.update(fraction)
        if fraction >= 1:
            stages.begin("rewriting the model")

    stages.begin(CAPTURING)
    return prune(
        model,
        tokenizer,
        calibration=batches,
        format=job.format,
        checkpoint=job.checkpoint,
        progress=calibrated,
        on_analysis=show_groups,
        held_out=(),  # text of its own measures
        **options,
    )
