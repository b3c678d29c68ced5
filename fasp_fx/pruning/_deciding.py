"""The steps between a captured model and what goes of it: analyse, measure, allocate, calibrate."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..allocation._allocation import CostAllocation
from ..allocation.costs import Costs, check_costs
from ..analysis import plan as plans
from ..analysis._analysis import Analysis
from ..analysis.plan import PruningPlan
from ..base._options import path_of
from ..calibration._consumers import Consumers
from ..calibration._journal import Journal, open_journal
from ..calibration._order import Planned
from ..calibration._ranks import Ranks
from ..calibration._visit import Decision
from ..errors import ArgumentError
from ..storage._folder import claim, refuse_other
from ._allocating import allocate, budget_for, check_request
from ._calibrating import calibrate
from ._measuring import Measured, measure_costs
from ._method import Method
from ._rewriting import Timings
from ._subject import Subject
from .config import PruningConfig

#: the part of the progress shown that measuring costs takes, where they are measured
PROGRESS_SHARE_MEASURING = 0.35
#: the part of the rest that a search takes
PROGRESS_SHARE_SEARCHING = 0.6
#: the options that say how what stays is restored, and not what goes
_RESTORING = ("restore", "drift")


def decide(
    subject: Subject,
    config: PruningConfig,
    calibration: Iterable[Any] | None,
    *,
    progress: Callable[[float], None] | None = None,
    on_analysis: Callable[[Analysis], None] | None = None,
    costs: Costs | None = None,
    loss: Literal["outputs", "next-token"] = "outputs",
    ranks: Ranks | None = None,
    checkpoint: str | Path | None = None,
    clock: Timings | None = None,
) -> Iterator[tuple[str, Decision]]:
    """What goes of each program of a model, one after another: whoever puts a program into its place before
    asking for the next lets that see it. Arguments and errors as for :func:`fasp_fx.prune`.

    Args:
        loss: what ``loss="auto"`` stands for.
        ranks: the processes that share the batches.
        clock: told when each step is done.
    """
    ranks, clock, advance = ranks or Ranks(), clock or Timings(), progress or (lambda fraction: None)
    subject.check_weights()
    folder = _checkpoint_folder(checkpoint, config)
    fingerprint = functools.cache(subject.fingerprint)
    method = Method.of(config, loss)
    if costs is not None:
        check_costs(costs, fingerprint(), config.score_name, config.granularity)
        if not isinstance(method.allocation, CostAllocation):
            raise ArgumentError(
                "costs= is for an allocation by predicted losses, and this one is uniform; leave it out, or"
                " pass allocation='global'"
            )
    clock.lap("capture")
    groups = subject.analyze(config).groups
    budget = budget_for(config, subject.chosen(), subject.count)
    check_request(method, budget, groups, costs)
    clock.lap("analysis")
    for analysis in subject.analyses.values():
        if on_analysis is not None:
            on_analysis(analysis)
    batches = subject.read(calibration) if config.needs_data else None
    ranks.check_alike(fingerprint, () if batches is None else subject.leaves(batches), vars(config))
    consumers, done = _consumers(subject, config), 0.0
    measured = Measured(method, costs)
    if batches is not None and method.needs_measuring:
        done = PROGRESS_SHARE_MEASURING
        measured = measure_costs(
            method,
            consumers,
            lambda path: subject.inputs(path, batches),
            subject.within,
            fingerprint(),
            ranks,
            lambda fraction: advance(done * fraction),
            costs,
        )
        clock.lap("measuring")
    start = done + PROGRESS_SHARE_SEARCHING * (1 - done) if method.runs_trials else done
    budget = subject.served(budget)
    lost, notes = allocate(
        measured.method,
        budget,
        groups,
        measured.costs,
        subject.trial(measured.trials),
        lambda fraction: advance(done + (start - done) * fraction),
    )
    lost = budget.spread(lost)
    if method.runs_trials:
        clock.lap("searching")
    subject.notes = [*notes, *_remarks(measured, subject, config, lost)]
    if folder is not None and "" not in consumers and not ranks.rank:
        claim(folder, "prune", {"parts": list(consumers)})
    for number, (path, share) in enumerate(subject.split(lost).items()):

        def advanced(fraction: float, done: int = number) -> None:
            advance(start + (1 - start) * (done + fraction) / len(subject.analyses))

        advanced(0.0)
        if subject.leaves_whole(path, share):
            continue
        inputs = None if batches is None else subject.inputs(path, batches)
        if inputs is not None and not inputs:
            continue
        journal = None
        if folder is not None and inputs is not None and not ranks.rank:
            own = folder / f"part-{number}" if path else folder
            journal = _journal(own, consumers[path], config, share, inputs, ranks)
        decision = calibrate(measured.method, consumers[path], share, inputs, ranks, advanced, journal)
        clock.lap("calibration")
        if not path:
            decision.notes.extend(subject.notes)
        yield path, decision
    if "" not in consumers:  # the last parts may have stayed whole
        advance(1.0)


def _consumers(subject: Subject, config: PruningConfig) -> dict[str, Consumers]:
    """Those of the programs that the batches serve."""
    return {
        path: Consumers(analysis, config.restore is not None, path)
        for path, analysis in subject.analyses.items()
        if path not in subject.unserved
    }


def measuring_config(config: PruningConfig) -> PruningConfig:
    """A configuration with an allocation that wants costs."""
    if isinstance(config.allocator, CostAllocation):
        return config
    return replace(config, sparsity=None if config.budget else config.target_sparsity, allocation="global")


def measure_subject(
    subject: Subject,
    config: PruningConfig,
    calibration: Iterable[Any],
    *,
    ranks: Ranks,
    progress: Callable[[float], None] | None = None,
    loss: Literal["outputs", "next-token"] = "outputs",
) -> Costs:
    """The cost curves of a model, on all of the batches; arguments and errors as for :func:`decide` and
    :func:`fasp_fx.measure`.
    """
    subject.check_weights()
    subject.analyze(config)
    batches, fingerprint = subject.read(calibration), subject.fingerprint()
    ranks.check_alike(lambda: fingerprint, subject.leaves(batches), vars(config))
    measured = measure_costs(
        Method.of(config, loss),
        _consumers(subject, config),
        lambda path: subject.inputs(path, batches),
        subject.within,
        fingerprint,
        ranks,
        progress or (lambda fraction: None),
        part=1,
    )
    assert measured.costs is not None
    return measured.costs


def restoring_config(config: PruningConfig, plan: Any, has_data: bool) -> PruningConfig:
    """How to restore behind a plan.

    Raises:
        ArgumentError: the plan is none, something else was asked for, or there are no data to do it with.
    """
    if not isinstance(plan, PruningPlan):
        raise ArgumentError(
            f"plan is a {type(plan).__name__}; pass a PruningPlan (PruningPlan.from_json reads one that was"
            " written as text)"
        )
    if others := config.non_default_fields(_RESTORING):
        raise ArgumentError(f"the plan says what goes, so that {others[0]}= has nothing to say; leave it out")
    if not has_data and config.non_default_fields(()):
        raise ArgumentError("nothing is restored without data; give calibration=, or leave out how to")
    return replace(config, granularity=plan.granularity, include=plan.include)


def replay(
    subject: Subject,
    plan: PruningPlan,
    config: PruningConfig,
    calibration: Iterable[Any] | None,
    *,
    progress: Callable[[float], None] | None = None,
    clock: Timings | None = None,
) -> Iterator[tuple[str, Decision]]:
    """What a plan takes of each program of a model, with what stays repaired where there are batches; as
    :func:`decide`.

    Raises:
        PlanError: the plan is for another model.
        CalibrationError: the batches do not fit.
    """
    clock, advance = clock or Timings(), progress or (lambda fraction: None)
    clock.lap("capture")
    subject.analyze(plan)
    removed = subject.removed_by(plan)
    clock.lap("analysis")
    batches = None if calibration is None else subject.read(calibration)
    for number, (path, gone) in enumerate(removed.items()):
        decision, inputs = Decision(gone), [] if batches is None else subject.inputs(path, batches)
        if inputs:
            planned = Planned(subject.analyses[path], gone)
            decision = calibrate(
                Method.of(replace(config, score=planned)),
                Consumers(subject.analyses[path], config.restore is not None, path),
                planned.lost,
                inputs,
                Ranks(),
                lambda fraction, done=number: advance((done + fraction) / len(removed)),  # type: ignore[misc]
            )
            clock.lap("calibration")
        yield path, decision


def _checkpoint_folder(checkpoint: str | Path | None, config: PruningConfig) -> Path | None:
    """The folder of a run that is kept.

    Raises:
        StoreError: it holds something else.
        ArgumentError: an option is a function, of which it cannot be told whether it is the same.
    """
    if checkpoint is None:
        return None
    folder = path_of(checkpoint, "checkpoint").absolute()
    refuse_other(folder)
    for name in ("score", "restore", "loss"):
        if callable(getattr(config, name)) and config.key is None:
            raise ArgumentError(
                f"{name}={getattr(config, name)!r} is code of your own, of which checkpoint= cannot tell"
                " whether it is the same when the run goes on; say which it is by a text, key=, or leave out"
                " checkpoint="
            )
    return folder


def _journal(
    folder: Path,
    consumers: Consumers,
    config: PruningConfig,
    lost: list[int],
    inputs: list[list[Any]],
    ranks: Ranks,
) -> Journal:
    """What is kept of the calibration of one program; what an allocation decides stands in it by itself, and
    which code of the user's it is, ``key`` says.
    """
    own: dict[str, Any] = {
        name: None for name in ("score", "restore", "allocation", "loss") if callable(getattr(config, name))
    }
    options = json.loads(replace(config, **own).to_json())
    options |= {name: "of the user's" for name in own if name != "allocation"}
    fingerprint = plans.running_fingerprint(consumers.analysis.program)
    return open_journal(folder, fingerprint, options, lost, inputs, ranks.size)


def _remarks(measured: Measured, subject: Subject, config: PruningConfig, lost: list[int]) -> list[str]:
    """What there is to say of an allocation."""
    found = []
    if measured.costs is not None and measured.method.needs_costs:
        names = [group.name for group in subject.chosen()]
        rise = measured.costs.predicted(dict(zip(names, lost, strict=True)))
        found.append(f"predicted rise of {measured.method.loss_description}: {rise:.3g}")
    if not any(lost):
        found.append(
            "nothing goes: the allocation takes nothing"
            if callable(config.allocation)
            else (
                "nothing goes: what was asked for is less than half a step of any group; ask for more, or for"
                " a smaller round_to"
            )
        )
    return found


__all__ = ["decide", "measure_subject", "measuring_config", "replay", "restoring_config"]
