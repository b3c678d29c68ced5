"""``fasp-fx prune``: text, pruning, measuring, saving."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .._page import check_page, write_page
from ..analysis import Analysis
from ..budgets import Cap
from ..errors import ArgumentError, CalibrationError, SparsityError
from ..evaluation import latency, perplexity
from ..hf import Pruned, prune
from ..report import Figure, counted
from . import _models, _saved, _tables, _text
from ._amounts import read_caps
from ._arguments import check_path, check_seed, check_text
from ._checkpoint import check_tokens
from ._console import Stages, say


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line; ``calibration`` is ``None`` for text of the model's own."""

    model: str
    out: Path
    sparsity: float | None
    calibration: Path | None
    text: Path | None
    round_to: int
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
    budget: Mapping[str, str | None] = field(default_factory=dict)
    uniform_layers: bool = False
    granularity: tuple[str, ...] = ()
    include: tuple[str, ...] = ()

    @cached_property
    def caps(self) -> tuple[Cap, ...]:
        """The budgets.

        Raises:
            ArgumentError: an amount is none.
        """
        return read_caps(self.budget)

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            FaspError: says which option and why.
        """
        if self.caps and self.sparsity is not None:
            raise ArgumentError(f"--sparsity {self.sparsity:g} and --{self.caps[0].name} both say how much goes; leave one of them out")
        if self.plain and self.caps:
            raise ArgumentError(f"--{self.caps[0].name} cannot go with --plain, whose steps are coarse; give --sparsity, or leave out --plain")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise SparsityError(f"--sparsity {self.sparsity:g} is not between 0 and 1; 0.2 removes a fifth")
        for option, value, least in (
            ("--round-to", self.round_to, 1),
            ("--batches", self.batches, 1),
            ("--length", self.length, 2),
            ("--eval-batches", self.eval_batches, 1),
        ):
            if value < least:
                raise ArgumentError(f"{option} {value} is too small; use at least {least}")
        check_seed(self.seed)
        check_text("--calibration", self.calibration, "give a text file, or 'self'")
        check_text("--text", self.text)
        own = (self.batches if self.calibration is None else 0, self.eval_batches if self.text is None else 0)
        _text.check_amount(own, self.length)
        if self.plain and self.include:
            raise ArgumentError(f"--include {self.include[0]} cannot go with --plain: no config says what is left of such groups; leave one of them out")
        _saved.check_target(self.out, overwrite=self.overwrite, plain=self.plain)
        if self.html is not None:
            check_path("--html", self.html)
            check_page(self.html)


class Texts:
    """The chunks to calibrate on and those to measure on, which calibration does not see."""

    def __init__(self, request: Request, tokenizer: Any) -> None:
        self.request, self.tokenizer = request, tokenizer
        self.calibration: Tensor | None = None
        self.evaluation: Tensor | None = None
        self.label = f"perplexity on text that the model wrote itself, not seen by calibration ({request.eval_batches} x {request.length} tokens)"
        used = 0
        if request.calibration is not None:
            chunks = _text.read_chunks(request.calibration, tokenizer, request.length)
            self.calibration = chunks[: request.batches]
            used = len(self.calibration)
        if request.text is not None:
            chunks = _text.read_chunks(request.text, tokenizer, request.length)
            first = used if request.calibration is not None and request.text.samefile(request.calibration) else 0
            self.evaluation = chunks[first : first + request.eval_batches]
            if not len(self.evaluation):
                raise CalibrationError(
                    f"calibration takes all {len(chunks)} chunks of '{request.text}', leaving none to measure; use fewer --batches or a smaller --length"
                )
            last = first + len(self.evaluation) - 1
            self.label = f"perplexity on chunks {first} to {last} of {request.text.name} ({len(self.evaluation)} x {request.length} tokens)"

    def write(self, model: Any, stages: Stages) -> None:
        """Let the model write what no file gives."""
        wanted = (self.request.batches if self.calibration is None else 0, self.request.eval_batches if self.evaluation is None else 0)
        if not sum(wanted):
            return
        stages.begin(f"letting the model write {sum(wanted)} texts of {self.request.length} tokens", measured=True)
        start = _text.start_token(model, self.tokenizer)
        written = _text.sample(model, start, sum(wanted), self.request.length, seed=self.request.seed, progress=stages.update)
        if self.calibration is None:
            self.calibration = written[: wanted[0]]
        if self.evaluation is None:
            self.evaluation = written[wanted[0] :]


@dataclass
class Job:
    """One pruning under way."""

    request: Request
    stages: Stages
    console: Console
    model: Any
    texts: Texts

    def batches(self) -> Iterator[dict[str, Any]]:
        """The calibration batches; text that the model must write first is written when the first is asked for."""
        self.texts.write(self.model, self.stages)
        assert self.texts.calibration is not None
        self.stages.begin(f"calibrating on {len(self.texts.calibration)} x {self.request.length} tokens", measured=True)
        for chunk in self.texts.calibration:
            yield {"input_ids": chunk[None].to(self.device)}

    @cached_property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def show_groups(self, analysis: Analysis) -> None:
        self.stages.end()
        for line in _tables.summary(analysis):
            say(self.console, line)

    def calibrated(self, fraction: float) -> None:
        self.stages.update(fraction)
        if fraction >= 1:
            self.stages.begin("rewriting the model")

    def prune(self) -> Pruned:
        request = self.request
        self.stages.begin("capturing and analysing the model")
        asked: dict[str, Any] = {name: value for name, value in (("granularity", request.granularity), ("include", request.include)) if value}
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
            **asked,
        )

    def measure(self, result: Pruned) -> tuple[Figure, ...]:
        if self.texts.evaluation is None:
            self.texts.write(self.model, self.stages)
        chunks = self.texts.evaluation
        assert chunks is not None
        self.stages.begin("measuring latency", measured=True)
        times = latency([self.model, result.model], chunks[:1], progress=self.stages.update)
        values = []
        for name, module in (("dense", self.model), ("pruned", result.model)):
            self.stages.begin(f"measuring perplexity of the {name} model", measured=True)
            values.append(perplexity(module, chunks, progress=self.stages.update))
        self.stages.end()
        return (
            Figure(f"milliseconds for one chunk of {self.request.length} tokens", times[0] * 1e3, times[1] * 1e3, 1),
            Figure(self.texts.label, values[0], values[1], 3),
        )


def run(request: Request, stages: Stages, console: Console) -> None:
    """Do what the request says.

    Raises:
        FaspError: it cannot be met; nothing is written then.
    """
    request.check()
    _models.quieten()
    device = _models.find_device(request.device)
    torch.manual_seed(request.seed)
    source = _models.Source.of(request.model)
    stages.begin("loading the tokenizer and the text")
    texts = Texts(request, _models.load_tokenizer(source))
    stages.begin("loading the model")
    model = _models.load_model(source, dtype=request.dtype, device=device)
    _models.check_length(model, request.length)
    given = (("the calibration text", texts.calibration), ("the text to measure on", texts.evaluation))
    for name, chunks in given:
        if chunks is None:
            _text.check_output(model, torch.tensor([_text.start_token(model, texts.tokenizer)]))
        else:
            check_tokens(model, chunks, name)
            _text.check_output(model, chunks[0])
    job = Job(request, stages, console, model, texts)
    result = job.prune()
    try:
        result = result.measured(job.measure(result))
    finally:  # what was pruned is kept even if it could not be measured
        stages.begin("saving")
        result.save_pretrained(request.out, overwrite=request.overwrite)
    stages.end()
    report = result.report
    if request.html is not None:
        write_page(report, f"{source}, {report.sparsity:.0%} removed", request.html)
    cache = [] if report.cache is None else [Figure("bytes of cache per token of one sequence", *report.cache)]
    console.print(_tables.figures_table([Figure("parameters", *report.parameters), Figure("bytes", *report.bytes), *cache, *report.figures]))
    asked = f" (asked for {report.requested:.2%})" if report.requested is not None else ""
    say(console, f"removed {report.sparsity:.2%} of the linear weights of {counted(report.include)}{asked}")
    for spent in report.budgets:
        say(console, f"budget: {spent}")
    for note in report.notes:
        say(console, f"note: {note}")
    say(console, f"saved in {request.out}; load it with")
    for line in result.loading(request.out):
        say(console, f"  {line}")


__all__ = ["Request", "run"]
