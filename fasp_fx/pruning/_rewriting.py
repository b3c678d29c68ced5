"""Take out of a program what was decided, and say what came of it."""

from __future__ import annotations

import time
from dataclasses import replace

from ..analysis import plan as plans
from ..analysis._analysis import Analysis, analyze_program
from ..analysis.plan import PruningPlan
from ..analysis.resources import Sparsity
from ..calibration._visit import Decision
from ..capturing._program import Program
from ..passes import split_fused
from ._result import Result
from .check._check import carry_out
from .config import PruningConfig
from .report import cache_bytes, make_report


class Timings:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def analyze_for(program: Program, asked: PruningConfig | PruningPlan) -> Analysis:
    """The groups of a program at the granularities that are asked for, or that a plan was made with; fused
    weights are taken apart where they have to be.
    """
    return analyze_program(program, split_fused, asked.granularity, asked.include)


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
    return Result(held.module, plan, report, program.signature)


__all__ = ["Timings", "analyze_for", "make_plan", "rewrite"]
