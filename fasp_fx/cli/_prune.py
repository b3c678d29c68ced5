"""``fasp-fx prune``: text, pruning, measuring, saving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ..allocation.budgets import CacheBytes
from ..analysis._analysis import Analysis
from ..base._offload import offload
from ..base._tolerable import tolerable
from ..errors import ArgumentError, first_line
from ..hf import Pruned, prune
from ..hf._stages import pruned_already
from ..interop.page import check_page, write_page
from ..pruning.config import PruningConfig
from ..storage._run_folder import refuse_other
from . import _forecast, _models
from ._console import CAPTURING, Stages, process, say
from ._paths import check_target
from ._recover import measure, recover, save, show
from ._tables import summary
from ._text import Texts

#: the weights, what is repaired of them, and what is left of them
_COPIES = 2.2


def run(
    model: str,
    out: Path,
    config: PruningConfig | None,
    options: dict[str, Any],
    texts: Texts,
    stages: Stages,
    *,
    epochs: int,
    device: str | None,
    dtype: str,
    plain: bool,
    overwrite: bool,
    html: Path | None,
    checkpoint: Path | None,
    dry_run: bool,
    stream: bool,
    scratch: Path | None,
) -> None:
    """Do what the command says, as its help describes it.

    Args:
        config, options: how to prune, as :func:`fasp_fx.prune` takes them.
        texts: what to calibrate and to measure on.
        epochs: of the training that follows.

    Raises:
        FaspError: it cannot be met; nothing is written then.
    """
    whole = PruningConfig.of(config, options)
    for met, conflict in (
        (plain and whole.budgets, "a budget cannot go with --plain, whose steps are coarse; give --sparsity"),
        (
            plain and (whole.include or whole.exclude),
            "--include and --exclude cannot go with --plain: no config says what is left of such groups;"
            " leave one of them out",
        ),
        (
            epochs and texts.batches < 2,
            "--recover needs at least two --batches, of which one is held out",
        ),
        (
            epochs and stream,
            "--recover trains all weights at once, which --stream avoids to hold; run fasp-fx recover"
            " afterwards, or leave one out",
        ),
        (
            scratch is not None and not stream,
            f"--scratch {scratch} says where --stream keeps the weights; pass --stream, or leave it out",
        ),
        (
            dry_run and any(isinstance(cap, CacheBytes) for cap in whole.budgets),
            "--cache-bytes is counted of the program that generates, which --dry-run does not make; give it"
            " --sparsity or another budget",
        ),
    ):
        if met:
            raise ArgumentError(conflict)
    texts.check("--calibration")
    others = {"html": html, "checkpoint": checkpoint, "scratch": scratch}
    check_target(out, overwrite=overwrite, plain=plain, **others)
    if checkpoint is not None:
        refuse_other(checkpoint, "--checkpoint")
    if _models.is_saved(model):
        raise pruned_already(f"'{model}'")
    if html is not None:
        check_page(html)
    _models.quieten()
    where, source = _models.find_device(_own_device(device)), _models.Source.of(model)
    torch.manual_seed(texts.seed)
    if not dry_run or texts.file is not None:
        stages.begin("loading the tokenizer and the text")
        tokenizer = _models.load_tokenizer(source)
        texts.read(tokenizer, least=2 if epochs else 1)
    if dry_run:
        heads = "granularity" in options if plain else None
        batches = texts.batches if texts.used is None else len(texts.used)
        _forecast.run(source, whole, heads, batches, texts.length, dtype, where, stages)
        return
    stream = stream or (where.type == "cpu" and not epochs and _is_too_large(source, dtype, stages))
    folder = scratch or out.absolute().parent
    with offload(folder, device=where) if stream else nullcontext() as kept:
        stages.begin("loading the model")
        dense = _models.load_model(source, dtype=dtype, device="cpu" if stream else where, scratch=kept)
        _models.check_length(dense, texts.length)
        texts.check_against(dense, tokenizer)
        with _together(where) as group:
            shared: dict[str, Any] = {"group": group, "checkpoint": checkpoint, "config": config}
            result = _pruned(dense, tokenizer, texts, stages, plain, whole.needs_data, **shared, **options)
        if process("RANK", 0):  # all processes have the same
            return
        try:
            texts.write(dense, tokenizer, stages)
            if epochs:
                assert texts.used is not None
                result = recover(result, dense, texts.used, stages, epochs=epochs, seed=texts.seed)
            result = result.with_report(figures=measure(dense, result, texts, stages))
        finally:  # what was pruned is kept even if it could not be recovered or measured
            save(result, out, overwrite, stages)
    if html is not None:
        write_page(result.report, f"{source}, {result.report.sparsity:.0%} removed", html)
    show(result, out)


def _pruned(
    model: Any,
    tokenizer: Any,
    texts: Texts,
    stages: Stages,
    plain: bool,
    needs_data: bool,
    **options: Any,
) -> Pruned:
    """What :func:`fasp_fx.hf.prune` gives, with stages for what it does."""
    analysed: list[Analysis] = []

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
        if texts.used is not None and needs_data:
            begin_calibrating()

    def calibrated(fraction: float) -> None:
        stages.update(fraction)
        if fraction >= 1:
            stages.begin("rewriting the model")

    stages.begin("trying out what the config can say" if plain else CAPTURING)
    return prune(
        model,
        tokenizer,
        calibration=batches(),
        plain=plain,
        progress=calibrated,
        on_analysis=show_groups,
        **options,
    )


def _is_too_large(source: _models.Source, dtype: str, stages: Stages) -> bool:
    """Whether the weights have to be kept in files; says so."""
    needed, there = _COPIES * _models.weight_bytes(source, dtype), psutil.virtual_memory().available
    if needed > there:
        stages.console.print(
            f"the model takes some {needed / 2**30:.1f} GiB, of {there / 2**30:.1f} that can be had: its"
            " weights are kept in files, as with --stream"
        )
    return needed > there


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

