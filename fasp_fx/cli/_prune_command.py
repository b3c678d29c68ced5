"""``fasp-fx prune``: text, pruning, measuring, saving."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rich.console import Console

from ..allocation.budgets import Cap
from ..analysis._analysis import Analysis
from ..base.offload._context import offload
from ..errors import ArgumentError, SparsityError
from ..hf import Pruned, prune
from ..hf._stages import pruned_already
from ..interop.page import check_page, write_page
from ..pruning.config import PruningConfig
from ..storage._run_folder import refuse_other
from ..training.recovery import DistillationConfig
from . import _dry_run, _models, _processes, _saved, _tables
from ._amounts import read_caps
from ._arguments import check_apart, check_path
from ._console import CAPTURING, Stages, say
from ._outcome import measure, recover, show
from ._texts import Texts, Wanted

#: the weights, what is repaired of them, and what is left of them
_COPIES = 2.2


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line; ``calibration`` is ``None`` for text of the model's own."""

    model: str
    out: Path
    sparsity: float | None
    calibration: Path | None
    text: Path | None
    recover: int
    quality: str
    score: str | None
    allocation: str | None
    restore: bool
    batches: int
    length: int
    eval_batches: int
    device: str | None
    dtype: str
    plain: bool
    overwrite: bool
    seed: int
    html: Path | None = None
    round_to: int = PruningConfig.round_to
    budget: Mapping[str, str | None] = field(default_factory=dict)
    uniform_layers: bool = False
    checkpoint: Path | None = None
    dry_run: bool = False
    stream: bool = False
    scratch: Path | None = None
    granularity: tuple[str, ...] = ()
    include: tuple[str, ...] = ()

    @cached_property
    def caps(self) -> tuple[Cap, ...]:
        """The budgets.

        Raises:
            ArgumentError: an amount is none.
        """
        return read_caps(self.budget)

    @property
    def config(self) -> PruningConfig:
        """The options that a dry run obeys.

        Raises:
            FaspError: one is out of range.
        """
        return PruningConfig(
            sparsity=self.sparsity,
            budget=self.caps or None,
            quality=self.quality,  # type: ignore[arg-type]
            score=self.score,  # type: ignore[arg-type]
            allocation=self.allocation,  # type: ignore[arg-type]
            restore="least-squares" if self.restore else None,
            round_to=self.round_to,
            granularity=self.granularity or ("channel",),
            include=self.include,
            uniform_layers=self.uniform_layers,
        )

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            FaspError: says which option and why.
        """
        if self.caps and self.sparsity is not None:
            raise ArgumentError(
                f"--sparsity {self.sparsity:g} and --{self.caps[0].name} both say how much goes; leave one of"
                " them out"
            )
        if self.plain and self.caps:
            raise ArgumentError(
                f"--{self.caps[0].name} cannot go with --plain, whose steps are coarse; give --sparsity, or"
                " leave out --plain"
            )
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise SparsityError(f"--sparsity {self.sparsity:g} is not between 0 and 1; 0.2 removes a fifth")
        for option, value, least in (("--round-to", self.round_to, 1), ("--recover", self.recover, 0)):
            if value < least:
                raise ArgumentError(f"{option} {value} is too small; use at least {least}")
        self.texts.check("--calibration")
        if self.recover and self.batches < 2:
            raise ArgumentError("--recover needs at least two --batches, of which one is held out")
        if self.plain and self.include:
            raise ArgumentError(
                f"--include {self.include[0]} cannot go with --plain: no config says what is left of such"
                " groups; leave one of them out"
            )
        self._check_stream()
        _saved.check_target(self.out, overwrite=self.overwrite, plain=self.plain)
        check_path("--checkpoint", self.checkpoint)
        if self.checkpoint is not None:
            refuse_other(self.checkpoint, "--checkpoint")
        if _saved.is_saved(self.model):
            raise pruned_already(f"'{self.model}'")
        if self.html is not None:
            check_path("--html", self.html)
            check_page(self.html)
        check_apart(self.out, html=self.html, checkpoint=self.checkpoint, scratch=self.scratch)

    def _check_stream(self) -> None:
        if self.scratch is not None:
            check_path("--scratch", self.scratch)
            if not self.stream:
                raise ArgumentError(
                    f"--scratch {self.scratch} says where --stream keeps the weights; pass --stream, or leave"
                    " it out"
                )
            above = next(
                path
                for path in (self.scratch.absolute(), *self.scratch.absolute().parents)
                if os.path.lexists(path)
            )
            if not above.is_dir():
                raise ArgumentError(
                    f"--scratch {self.scratch} cannot be made: '{above}' is no folder; give another one"
                )
        if not self.stream:
            return
        if self.recover:
            raise ArgumentError(
                "--recover trains all weights at once, which --stream avoids to hold; run fasp-fx recover"
                " afterwards, or leave one out"
            )

    @property
    def texts(self) -> Wanted:
        """The text that is needed."""
        return Wanted(self.calibration, self.batches, self.text, self.eval_batches, self.length, self.seed)


@dataclass
class Job:
    """One pruning under way."""

    request: Request
    stages: Stages
    console: Console
    model: Any
    texts: Texts
    group: dist.ProcessGroup | None = None
    analysed: bool = False
    asked: bool = False

    def batches(self) -> Iterator[dict[str, Any]]:
        """The calibration batches; text that the model must write first is written when the first is asked
        for.
        """
        self.texts.write(self.model, self.stages)
        self.asked = True
        if self.analysed:
            self._begin_calibrating()
        else:  # the first is the example that the model is captured with
            self.stages.begin(CAPTURING)
        assert self.texts.used is not None
        for chunk in self.texts.used:
            yield {"input_ids": chunk[None].to(self.device)}

    def _begin_calibrating(self) -> None:
        assert self.texts.used is not None
        self.stages.begin(
            f"calibrating on {len(self.texts.used)} x {self.request.length} tokens", measured=True
        )

    @cached_property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def show_groups(self, analysis: Analysis) -> None:
        self.stages.end()
        for line in _tables.summary(analysis):
            say(self.console, line)
        self.analysed = True
        if self.asked:
            self._begin_calibrating()

    def calibrated(self, fraction: float) -> None:
        self.stages.update(fraction)
        if fraction >= 1:
            self.stages.begin("rewriting the model")

    def prune(self) -> Pruned:
        request = self.request
        self.stages.begin("trying out what the config can say" if request.plain else CAPTURING)
        asked: dict[str, Any] = {
            name: value
            for name, value in (("granularity", request.granularity), ("include", request.include))
            if value
        }
        asked |= {"quality": request.quality, "score": request.score, "allocation": request.allocation}
        return prune(
            self.model,
            self.texts.tokenizer,
            calibration=self.batches(),
            sparsity=request.sparsity,
            budget=request.caps,
            plain=request.plain,
            restore="least-squares" if request.restore else None,
            round_to=request.round_to,
            uniform_layers=request.uniform_layers,
            progress=self.calibrated,
            on_analysis=self.show_groups,
            group=self.group,
            checkpoint=request.checkpoint,
            **asked,
        )

    def recover(self, result: Pruned) -> Pruned:
        """Train what was pruned on the text that calibrated it."""
        assert self.texts.used is not None
        return recover(
            result,
            self.model,
            self.texts.used,
            self.stages,
            DistillationConfig(epochs=self.request.recover, seed=self.request.seed),
        )


def run(request: Request, stages: Stages, console: Console) -> None:
    """Do what the request says.

    Raises:
        FaspError: it cannot be met; nothing is written then.
    """
    request.check()
    _models.quieten()
    device = _models.find_device(_processes.own_device(request.device))
    torch.manual_seed(request.seed)
    source = _models.Source.of(request.model)
    if request.dry_run:
        _forecast(request, source, device, stages, console)
        return
    stages.begin("loading the tokenizer and the text")
    texts = Texts(request.texts, _models.load_tokenizer(source))
    if request.recover:
        texts.check_two()
    stream = request.stream or _is_too_large(request, source, device, stages)
    folder = request.scratch or request.out.absolute().parent
    with offload(folder, device=device) if stream else nullcontext() as scratch:
        stages.begin("loading the model")
        where = "cpu" if stream else device
        model = _models.load_model(source, dtype=request.dtype, device=where, scratch=scratch)
        _models.check_length(model, request.length)
        texts.check(model, "the calibration text")
        with _processes.together(device) as group:
            job = Job(request, stages, console, model, texts, group)
            result = job.prune()
        if _processes.rank() == 0:  # all processes have the same
            _finish(job, result, source)


def _forecast(
    request: Request, source: _models.Source, device: torch.device, stages: Stages, console: Console
) -> None:
    """Say what the request would take."""
    batches = request.batches
    if request.calibration is not None:
        stages.begin("loading the tokenizer and the text")
        used = Texts(request.texts, _models.load_tokenizer(source)).used
        batches = batches if used is None else len(used)
    heads_asked = bool(request.granularity) if request.plain else None
    size = batches, request.length, request.dtype
    _dry_run.run(source, request.config, heads_asked, *size, device, stages, console)
    if request.recover:
        say(console, "training is not counted: it holds weights, gradients and two averages of them")


def _is_too_large(request: Request, source: _models.Source, device: torch.device, stages: Stages) -> bool:
    """Whether the weights have to be kept in files; says so."""
    if device.type != "cpu" or request.recover:
        return False
    needed, there = _COPIES * _models.weight_bytes(source, request.dtype), psutil.virtual_memory().available
    if needed <= there:
        return False
    stages.console.print(
        f"the model takes some {needed / 2**30:.1f} GiB, of {there / 2**30:.1f} that can be had: its weights"
        " are kept in files, as with --stream"
    )
    return True


def _finish(job: Job, result: Pruned, source: _models.Source) -> None:
    """Recover, measure and save what was pruned, and show it."""
    request, stages, model, texts = job.request, job.stages, job.model, job.texts
    try:
        texts.write(model, stages)
        if request.recover:
            result = job.recover(result)
        result = result.with_report(figures=measure(model, result, texts, stages))
    finally:  # what was pruned is kept even if it could not be recovered or measured
        stages.begin("saving")
        result.save_pretrained(request.out, overwrite=request.overwrite)
    stages.end()
    report = result.report
    if request.html is not None:
        write_page(report, f"{source}, {report.sparsity:.0%} removed", request.html)
    show(result, request.out, job.console)


__all__ = ["Request", "run"]
