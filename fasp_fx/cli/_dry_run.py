"""``fasp-fx prune --dry-run``: what it would take, with no weight loaded."""

from __future__ import annotations

import psutil
import torch
from rich.console import Console
from rich.table import Table

from ..allocation.budgets import CacheBytes
from ..base.offload._context import RESIDENT
from ..errors import ArgumentError
from ..hf._plain import plain_config
from ..pruning._allocating import budget_for, check_request, counted
from ..pruning._method import Method
from ..pruning._prune import analyze
from ..pruning.config import PruningConfig
from . import _models
from ._console import CAPTURING, Stages, say
from ._forecast import Forecast, forecast

_GIB = 2**30


def run(
    source: _models.Source,
    config: PruningConfig,
    heads_asked: bool | None,
    batches: int,
    length: int,
    dtype: str,
    device: torch.device,
    stages: Stages,
    console: Console,
) -> None:
    """Say what it would take to prune a model on so many batches of one text of so many tokens.

    Args:
        heads_asked: of a plain checkpoint, as for :func:`fasp_fx.hf._plain.plain_config`; ``None``: no plain
            one.
        device: where batches are to run.

    Raises:
        FaspError: the model cannot be analysed, or not be pruned as asked for.
    """
    if any(isinstance(cap, CacheBytes) for cap in config.caps):
        raise ArgumentError(
            "--cache-bytes is counted of the program that generates, which --dry-run does not make; give it"
            " --sparsity or another budget"
        )
    stages.begin("reading the configuration")
    empty = _models.load_empty(source)
    _models.check_length(empty, length)
    if heads_asked is not None:
        config = plain_config(empty, config, heads_asked)[2]
    stages.begin(CAPTURING)
    example = {"input_ids": torch.zeros(1, length, dtype=torch.long), "use_cache": False}
    analysis = analyze(empty, (), example, granularity=config.granularity, include=config.include)
    budget = budget_for(config, analysis.chosen, lambda cap: counted(analysis, cap))
    check_request(Method.of(config), budget, analysis.groups)
    stages.begin("measuring how fast this machine is")
    named = _models.DTYPES.get(dtype) or getattr(getattr(empty, "config", None), "dtype", None)
    found = forecast(
        analysis,
        config,
        batches,
        dtype=named if isinstance(named, torch.dtype) else torch.float32,
        device=device,
    )
    stages.end()
    console.print(_table(found))
    for line in _lines(found, device):
        say(console, line)


def _table(found: Forecast) -> Table:
    table = Table("step", "floating-point operations", "minutes", title=None)
    for step, count in found.operations.items():
        table.add_row(step, f"{count:.2e}", f"{(found.seconds or {}).get(step, 0.0) / 60:.1f}")
    return table


def _lines(found: Forecast, device: torch.device) -> list[str]:
    there = psutil.virtual_memory().available + found.base
    streamed = found.streamed(RESIDENT)
    lines = [
        (
            f"memory: {found.peak / _GIB:.1f} GiB at most, or {streamed / _GIB:.1f} GiB with --stream and"
            f" {found.disk / _GIB:.1f} GiB of disk; {there / _GIB:.1f} GiB can be had"
        ),
        (
            f"of that {found.weights / _GIB:.1f} GiB dense weights, {found.pruned / _GIB:.1f} pruned,"
            f" {(found.waiting + found.running) / _GIB:.1f} activations,"
            f" {found.matrices / _GIB:.1f} Gram matrices,"
            f" {found.solving / _GIB:.1f} for the repair of one weight"
        ),
    ]
    if device.type != "cpu":
        lines.append(f"with --stream, {found.on_device / _GIB:.1f} GiB of that on '{device}'")
    if found.seconds is not None:
        lines.append(
            f"time: about {sum(found.seconds.values()) / 60:.0f} minutes, at the rate of this machine just"
            " now; text that the model writes is not counted"
        )
    if found.peak > there:
        lines.append(
            "it does not fit: pass --stream"
            if streamed <= there
            else "it does not fit, with --stream either: use fewer or shorter --batches"
        )
    return lines


__all__ = ["run"]
