"""``fasp-fx prune``: text, pruning, measuring, saving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ..allocation.budgets import CacheBytes
from ..analysis._analysis import Analysis
from ..base._tolerable import tolerable
from ..base.offload._context import offload
from ..errors import ArgumentError, first_line
from ..hf import Pruned, prune
from ..hf._stages import pruned_already
from ..interop.page import check_page, write_page
from ..storage._run_folder import refuse_other
from . import _forecast, _models
from ._console import CAPTURING, Stages, process, say
from ._options import Asked
from ._paths import check_target
from ._results import measure, recover, save, show
from ._tables import summary
from ._text import Texts

#: the weights, what is repaired of them, and what is left of them
_COPIES = 2.2


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line, as its help says; ``asked`` is how to prune, ``texts`` what
    to calibrate and measure on.
    """

    model: str
    out: Path
    asked: Asked
    texts: Texts
    recover: int
    device: str | None
    dtype: str
    plain: bool
    overwrite: bool
    html: Path | None
    checkpoint: Path | None
    dry_run: bool
    stream: bool
    scratch: Path | None

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            FaspError: says which option and why.
        """
        config = self.asked.whole
        for met, conflict in (
            (
                self.plain and config.caps,
                "a budget cannot go with --plain, whose steps are coarse; give --sparsity",
            ),
            (
                self.plain and (config.include or config.exclude),
                "--include and --exclude cannot go with --plain: no config says what is left of such groups;"
                " leave one of them out",
            ),
            (
                self.recover and self.texts.batches < 2,
                "--recover needs at least two --batches, of which one is held out",
            ),
            (
                self.recover and self.stream,
                "--recover trains all weights at once, which --stream avoids to hold; run fasp-fx recover"
                " afterwards, or leave one out",
            ),
            (
                self.scratch is not None and not self.stream,
                f"--scratch {self.scratch} says where --stream keeps the weights; pass --stream, or leave it"
                " out",
            ),
            (
                self.dry_run and any(isinstance(cap, CacheBytes) for cap in config.caps),
                "--cache-bytes is counted of the program that generates, which --dry-run does not make; give"
                " it --sparsity or another budget",
            ),
        ):
            if met:
                raise ArgumentError(conflict)
        self.texts.check("--calibration")
        others = {"html": self.html, "checkpoint": self.checkpoint, "scratch": self.scratch}
        check_target(self.out, overwrite=self.overwrite, plain=self.plain, **others)
        if self.checkpoint is not None:
            refuse_other(self.checkpoint, "--checkpoint")
        if _models.is_saved(self.model):
            raise pruned_already(f"'{self.model}'")
        if self.html is not None:
            check_page(self.html)


def run(request: Request, stages: Stages) -> None:
    """Do what the request says.

    Raises:
        FaspError: it cannot be met; nothing is written then.
    """
    request.check()
    _models.quieten()
    device = _models.find_device(_own_device(request.device))
    torch.manual_seed(request.texts.seed)
    source, texts = _models.Source.of(request.model), request.texts
    if not request.dry_run or texts.file is not None:
        stages.begin("loading the tokenizer and the text")
        tokenizer = _models.load_tokenizer(source)
        texts.read(tokenizer, least=2 if request.recover else 1)
    if request.dry_run:
        heads = "granularity" in request.asked.options if request.plain else None
        batches = texts.batches if texts.used is None else len(texts.used)
        size = batches, texts.length, request.dtype
        _forecast.run(source, request.asked.whole, heads, *size, device, stages)
        return
    stream = request.stream or _is_too_large(request, source, device, stages)
    folder = request.scratch or request.out.absolute().parent
    with offload(folder, device=device) if stream else nullcontext() as scratch:
        stages.begin("loading the model")
        where = "cpu" if stream else device
        model = _models.load_model(source, dtype=request.dtype, device=where, scratch=scratch)
        _models.check_length(model, texts.length)
        texts.check_against(model, tokenizer)
        with _together(device) as group:
            result = _pruned(request, model, tokenizer, group, stages)
        if not process("RANK", 0):  # all processes have the same
            _finish(request, result, model, stages)


def _pruned(
    request: Request, model: Any, tokenizer: Any, group: dist.ProcessGroup | None, stages: Stages
) -> Pruned:
    texts, analysed = request.texts, list[Analysis]()

    def batches() -> Iterator[dict[str, Any]]:
        is_written = texts.used is None  # only when the first batch is asked for
        texts.write(model, tokenizer, stages)
        if not analysed:  # the first is the example that the model is captured with
            stages.begin(CAPTURING)
        elif is_written:
            begin_calibrating()
        assert texts.used is not None
        for chunk in texts.used:
            yield {"input_ids": chunk[None].to(next(model.parameters()).device)}

    def begin_calibrating() -> None:
        assert texts.used is not None
        stages.begin(f"calibrating on {len(texts.used)} x {texts.length} tokens", measured=True)

    def show_groups(analysis: Analysis) -> None:
        stages.end()
        for line in summary(analysis):
            say(line)
        analysed.append(analysis)
        if texts.used is not None and request.asked.whole.needs_data:
            begin_calibrating()

    def calibrated(fraction: float) -> None:
        stages.update(fraction)
        if fraction >= 1:
            stages.begin("rewriting the model")

    stages.begin("trying out what the config can say" if request.plain else CAPTURING)
    return prune(
        model,
        tokenizer,
        calibration=batches(),
        config=request.asked.config,
        plain=request.plain,
        progress=calibrated,
        on_analysis=show_groups,
        group=group,
        checkpoint=request.checkpoint,
        **request.asked.options,
    )


def _finish(request: Request, result: Pruned, model: Any, stages: Stages) -> None:
    """Recover, measure and save what was pruned, and show it."""
    texts = request.texts
    try:
        texts.write(model, result.tokenizer, stages)
        if request.recover:
            assert texts.used is not None
            result = recover(result, model, texts.used, stages, epochs=request.recover, seed=texts.seed)
        result = result.with_report(figures=measure(model, result, texts, stages))
    finally:  # what was pruned is kept even if it could not be recovered or measured
        save(result, request.out, request.overwrite, stages)
    if request.html is not None:
        write_page(result.report, f"{request.model}, {result.report.sparsity:.0%} removed", request.html)
    show(result, request.out)


def _is_too_large(request: Request, source: _models.Source, device: torch.device, stages: Stages) -> bool:
    """Whether the weights have to be kept in files; says so."""
    needed, there = _COPIES * _models.weight_bytes(source, request.dtype), psutil.virtual_memory().available
    if device.type != "cpu" or request.recover or needed <= there:
        return False
    stages.console.print(
        f"the model takes some {needed / 2**30:.1f} GiB, of {there / 2**30:.1f} that can be had: its weights"
        " are kept in files, as with --stream"
    )
    return True


def _own_device(name: str | None) -> str | None:
    """The device of this process, if none is named: of several accelerators the one of its number on this
    machine.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is not None or process("WORLD_SIZE", 1) == 1 or accelerator is None:
        return name
    return f"{accelerator.type}:{process('LOCAL_RANK', 0) % torch.accelerator.device_count()}"


@contextmanager
def _together(device: torch.device) -> Iterator[dist.ProcessGroup | None]:
    """The group of all processes that ``torchrun`` started, while they work; ``None`` for one alone.

    Raises:
        ArgumentError: they do not find one another.
    """
    count, backends = process("WORLD_SIZE", 1), "cpu:gloo"
    if count == 1:
        yield None
        return
    try:
        if device.type != "cpu":
            backends += f",{device.type}:{dist.get_default_backend_for_device(device)}"
            torch.accelerator.set_device_index(device.index or 0)
        dist.init_process_group(backends)
    except tolerable(RuntimeError, ValueError) as error:
        raise ArgumentError(
            f"the {count} processes do not find one another: {first_line(error)}; start them with torchrun"
        ) from error
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


__all__ = ["Request", "run"]
