"""Which channels of a program go, and what repairs the rest."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from ..base._offload import computing
from ..base._tolerable import short_of_memory
from ..base._undisturbed import drawing_alike, in_turns
from ..calibration._consumers import Consumers
from ..calibration._drift import Drift
from ..calibration._journal import Journal
from ..calibration._marks import Marks
from ..calibration._needed import Needed
from ..calibration._pieces import halved
from ..calibration._ranks import Ranks
from ..calibration._visit import Decision, Observer
from ..capturing._program import Program
from ..capturing._runner import Runner
from ..errors import OffloadError, first_line
from ._method import Method, precision_of


def calibrate(
    method: Method,
    consumers: Consumers,
    lost: list[int],
    batches: list[list[Any]] | None,
    ranks: Ranks,
    advance: Callable[[float], None],
    journal: Journal | None = None,
) -> Decision:
    """Run the calibration batches of a program, choose what goes and repair what stays; with batches of half
    the size where memory is too short for them.

    Args:
        lost: channel sets that each block of each chosen group loses.
        journal: keeps what is decided, for the same calibration to go on from there.
    """
    divided, advance = False, in_turns(advance)
    while True:
        try:
            decision = _calibrated(method, consumers, lost, batches, ranks, advance, journal)
            break
        except short_of_memory() as error:
            short = error.with_traceback(None)  # which would hold on to all that was computed
        consumers.forget_activations()
        gc.collect()
        smaller = _smaller(consumers.analysis.program, batches, ranks)
        if smaller is None and computing() is None:
            raise short
        if smaller is None:
            raise _too_little(method, consumers, short) from short
        batches, divided = smaller, True
        journal = None if journal is None else journal.reopened()
    if divided and batches is not None:
        decision.notes.append(
            f"memory was too short for the calibration batches, which were divided into {len(batches)}"
        )
    return decision


def _smaller(program: Program, batches: list[list[Any]] | None, ranks: Ranks) -> list[list[Any]] | None:
    """Batches of half the size; ``None`` where they cannot be halved, or other processes go on with the
    larger ones.
    """
    if batches is None or ranks.size > 1:
        return None
    try:
        return halved(program, batches)
    except short_of_memory():  # not even a few positions fit
        return None


def _calibrated(
    method: Method,
    consumers: Consumers,
    lost: list[int],
    batches: list[list[Any]] | None,
    ranks: Ranks,
    advance: Callable[[float], None],
    journal: Journal | None,
) -> Decision:
    program, drift, device = consumers.analysis.program, method.config.effective_drift, computing()
    runner = dense = marks = None
    if batches is not None:
        own = ranks.own(len(batches))
        given = [batches[index] for index in own]
        runner, dense = (
            Runner(program, given, numbers=own, returns=False, device=device) if wanted else None
            for wanted in (True, drift)
        )
        marks = Marks(program, batches, method.config.padding_mask, hold_out=method.restore is not None)
    drawn_on = [*program.weights().values(), torch.empty(0, device=device)]
    with torch.no_grad(), drawing_alike(drawn_on):
        observer = Observer(
            consumers, lost, method.score, method.restore, precision_of(program), ranks, journal
        )
        return observer.run(runner, marks, advance, None if dense is None else Drift(dense, drift))


def _too_little(method: Method, consumers: Consumers, error: Exception) -> OffloadError:
    """What to say where a device has too little memory beside weights in files: what it takes."""
    kind = next(iter(consumers.analysis.program.parameters().values())).dtype
    every = list(consumers.by_key.values())
    taken = Needed(consumers.analysis, every, kind, method.config.target_sparsity or 0.0).on_device
    return OffloadError(
        f"'{computing()}' has too little memory: {first_line(error)}; it takes some"
        f" {taken / 2**30:.2f} GiB with batches as large as the example; give smaller ones, or leave out"
        " the device of offload()"
    )


__all__ = ["calibrate"]
