"""The steps from a captured program to a smaller one, which all that prunes goes through: analyse, decide,
rewrite.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..allocation._allocation import CostAllocation
from ..allocation.costs import Costs, check_costs
from ..analysis import plan as plans
from ..analysis._analysis import Analysis, analyze_program
from ..analysis.plan import PruningPlan
from ..analysis.resources import Sparsity
from ..base._device import device_named
from ..base._options import path_of
from ..calibration._journal import open_journal
from ..calibration.observe._calibration import read_batches
from ..calibration.observe._consumers import Consumers
from ..calibration.observe._ranks import Ranks
from ..calibration.observe._visit import Decision
from ..capturing._program import Program
from ..errors import ArgumentError
from ..passes import split_fused
from ..storage._run_folder import refuse_other
from ._chooser import Chooser
from ._result import Result
from .check import carry_out
from .config import PruningConfig
from .report import cache_bytes, make_report

#: the part of the progress shown that measuring costs takes, where they are measured
MEASURING = 0.35
#: the part of the rest that a search takes
SEARCHING = 0.6


class Timings:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def analyze_for(program: Program, asked: PruningConfig | PruningPlan) -> Analysis:
    """The groups of a program at the granularities that are asked for, or that a plan was made with; fused
    weights are taken apart where they have to be.
    """
    return analyze_program(program, split_fused, asked.granularity, asked.include)


def decide(
    program: Program,
    config: PruningConfig,
    calibration: Iterable[Any] | None,
    *,
    device: torch.device | str | None = None,
    progress: Callable[[float], None] | None = None,
    on_analysis: Callable[[Analysis], None] | None = None,
    costs: Costs | None = None,
    loss: Literal["outputs", "next-token"] = "outputs",
    ranks: Ranks | None = None,
    checkpoint: str | Path | None = None,
    clock: Timings | None = None,
) -> tuple[Analysis, Decision]:
    """Analyse a captured program, calibrate it and decide what goes; arguments and errors as for
    :func:`fasp_fx.prune`.

    Args:
        loss: what ``loss="auto"`` stands for.
        ranks: the processes that share the batches.
        clock: told when each step is done.
    """
    ranks, clock, advance = ranks or Ranks(), clock or Timings(), progress or (lambda fraction: None)
    _check_weights(program)
    folder = None if checkpoint is None else path_of(checkpoint, "checkpoint").absolute()
    if folder is not None:
        refuse_other(folder)
        for name in ("score", "restore", "loss"):
            if callable(getattr(config, name)) and config.key is None:
                raise ArgumentError(
                    f"{name}={getattr(config, name)!r} is code of your own, of which checkpoint= cannot tell"
                    " whether it is the same when the run goes on; say which it is by a text, key=, or leave"
                    " out checkpoint="
                )
    fingerprint = functools.cache(lambda: plans.computed_fingerprint(program))
    if costs is not None:
        check_costs(costs, fingerprint(), config.score_name, config.granularity)
        if not isinstance(config.allocator, CostAllocation):
            raise ArgumentError(
                "costs= is for an allocation by predicted losses, and this one is uniform; leave it out, or"
                " pass allocation='global'"
            )
    clock.lap("capture")
    analysis = analyze_for(program, config)
    chooser, consumers = Chooser(config, loss, ranks), Consumers(analysis, config.restore is not None)
    budget = chooser.budget(analysis)
    chooser.check(budget, analysis.groups, costs)
    clock.lap("analysis")
    if on_analysis is not None:
        on_analysis(analysis)
    batches = None
    if config.needs_data:
        batches = read_batches(program, calibration, None if device is None else device_named(device))
    ranks.check_alike(fingerprint, batches or (), vars(config))
    kept = None
    if folder is not None and batches is not None and not ranks.rank:
        kept = folder, plans.running_fingerprint(program), _kept_options(config)
    measured = 0.0
    if batches is not None and chooser.measures:
        measured = MEASURING
        costs = chooser.measure(
            consumers, batches, fingerprint(), lambda fraction: advance(measured * fraction), costs
        )
        clock.lap("measuring")
    searched = measured + SEARCHING * (1 - measured) if chooser.tries else measured
    lost = chooser.allocate(
        budget,
        analysis.groups,
        costs,
        lambda fraction: advance(measured + (searched - measured) * fraction),
    )
    if chooser.tries:
        clock.lap("searching")
    journal = None if kept is None else open_journal(*kept, lost, batches or (), ranks.size)
    decision = chooser.choose(
        consumers, lost, batches, lambda fraction: advance(searched + (1 - searched) * fraction), journal
    )
    decision.notes.extend(chooser.notes)
    if costs is not None and chooser.needs_costs:
        rise = costs.predicted(dict(zip((group.name for group in budget.groups), lost, strict=True)))
        decision.notes.append(f"predicted rise of {chooser.said_loss}: {rise:.3g}")
    if not any(lost):
        decision.notes.append(
            "nothing goes: the allocation takes nothing"
            if callable(config.allocation)
            else (
                "nothing goes: what was asked for is less than half a step of any group; ask for more, or for"
                " a smaller round_to"
            )
        )
    clock.lap("calibration")
    return analysis, decision


def make_plan(program: Program, analysis: Analysis, decision: Decision) -> PruningPlan:
    """What was decided, as data; its result is not known yet."""
    entries = plans.planned(analysis.chosen, decision.gone, analysis)
    groups = tuple(entry for entry in entries if entry.removed_sets)
    return PruningPlan(
        plans.program_fingerprint(program),
        groups,
        Sparsity(analysis).removed([entry.removed_sets for entry in entries]),
        tuple(analysis.program.parts.values()) if groups else (),
        granularity=tuple(sorted(analysis.granularity)),
        include=tuple(sorted(analysis.include)),
        folds=program.folds,
        copies=analysis.program.copies if groups else (),
        fixed=plans.fixed_of(program),
    )


def rewrite(
    program: Program,
    analysis: Analysis,
    decision: Decision,
    config: PruningConfig | None = None,
    clock: Timings | None = None,
    whole: bool = False,
) -> Result:
    """Take out of a program what was decided for its analysis, hold the result against the masked dense
    program, and report it.

    Args:
        config: what was asked for; ``None`` where a plan is replayed, or for a part of a model.
        whole: raise where not all of what was decided holds, rather than leave some groups whole.

    Raises:
        VerificationError: nothing of what was decided holds.
    """
    clock = clock or Timings()
    held = carry_out(program, analysis, decision, clock.lap, whole)
    plan = make_plan(program, analysis, held.decision)
    plan = replace(plan, result=plans.fingerprint(dict(held.module.named_parameters(remove_duplicate=False))))
    report = make_report(
        analysis,
        plan,
        held.decision,
        program.parameters(),
        dict(held.module.named_parameters()),
        config,
        clock.seconds,
        held.left,
    )
    cache = cache_bytes(program.module.graph, held.module.graph, program.state_outputs)
    report = replace(report, cache=cache, notes=(*report.notes, *held.notes))
    return Result(held.module, plan, report, held.rewritten.signature)


def _check_weights(program: Program) -> None:
    for name, tensor in program.weights().items():
        if tensor.device.type == "meta":
            raise ArgumentError(
                f"'{name}' is on the meta device and has no values; analyze() works without weights, prune()"
                " needs them"
            )


def _kept_options(config: PruningConfig) -> dict[str, Any]:
    """What a checkpoint keeps of the options; what an allocation decides stands in it by itself, and which
    code of the user's it is, ``key`` says.
    """
    own: dict[str, Any] = {
        name: None for name in ("score", "restore", "allocation", "loss") if callable(getattr(config, name))
    }
    kept: dict[str, Any] = json.loads(replace(config, **own).to_json())
    return kept | {name: "of the user's" for name in own if name != "allocation"}


__all__ = ["MEASURING", "SEARCHING", "Timings", "analyze_for", "decide", "make_plan", "rewrite"]
