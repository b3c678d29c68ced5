"""Which channels of a program go, and what repairs the rest."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..base._offload import computing
from ..base._tolerable import short_of_memory
from ..base._undisturbed import drawing_alike, in_turns
from ..calibration._calibration import halved
from ..calibration._consumers import Consumers
from ..calibration._journal import Journal
from ..calibration._marks import Marks
from ..calibration._ranks import Ranks
from ..calibration._visit import Decision, Drift, Observer, without_data
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
            raise OffloadError(
                f"'{computing()}' has too little memory: {first_line(short)}; give smaller batches, or leave"
                " out the device of offload()"
            ) from short
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
    if batches is None:
        found = without_data(consumers, lost, method.score)
        advance(1.0)
        return found
    own = ranks.own(len(batches))
    given = [batches[index] for index in own]
    running = partial(Runner, program, given, numbers=own, returns=False, device=device)
    marks = Marks(program, batches, hold_out=method.restore is not None)
    drawn_on = [*program.weights().values(), torch.empty(0, device=device)]
    with torch.no_grad(), drawing_alike(drawn_on):
        return Observer(
            consumers,
            lost,
            method.score,
            method.restore,
            running(),
            marks,
            precision_of(program),
            ranks,
            journal,
            Drift(running(), drift) if drift else None,
        ).run(advance)


__all__ = ["calibrate"]
