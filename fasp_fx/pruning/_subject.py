"""What is pruned: the programs that a model was captured as, by path (``""`` is the model itself); and how
one becomes smaller.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..allocation._limits import Budget
from ..allocation.budgets import Cap, counted
from ..analysis import plan as plans
from ..analysis._analysis import Analysis, analyze_program
from ..analysis.plan import PruningPlan
from ..analysis.resources import Resource, Sparsity
from ..base._device import device_named
from ..calibration._calibration import read_batches
from ..calibration._trial import ModelTrial, ServedTrial
from ..calibration._visit import Decision
from ..capturing._program import Program
from ..errors import ArgumentError
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


class Subject:
    """A model on its way to a smaller one; captured as one program, unless a subclass says otherwise.

    Args:
        programs: what it was captured as, in the order in which the model runs them.
        device: where batches are moved.
        clock: told when each step is done.

    Attributes:
        whole: the groups of all programs, in the names of the model, once :meth:`analyze` was called.
        analyses: those of the programs that are pruned.
        unserved: the programs that the calibration batches do not serve, once :meth:`read` was called.
        notes: what there is to say of all programs together.
    """

    whole: Analysis

    def __init__(
        self,
        programs: Mapping[str, Program],
        device: torch.device | str | None = None,
        clock: Timings | None = None,
    ) -> None:
        self.programs, self._device = dict(programs), None if device is None else device_named(device)
        self.clock, self.analyses = clock or Timings(), dict[str, Analysis]()
        self.unserved: set[str] = set()
        self.notes: list[str] = []

    def analyze(self, asked: PruningConfig | PruningPlan) -> Analysis:
        """The groups of all programs, in the names of the model."""
        self.analyses = {path: analyze_for(program, asked) for path, program in self.programs.items()}
        self.whole = self.analyses[""]
        return self.whole

    def fingerprint(self) -> str:
        """What tells the model, with its weights, from others."""
        return plans.computed_fingerprint(self.programs[""])

    def count(self, cap: Cap | None) -> Resource:
        """What a budget counts, of all programs together; ``None``: what sparsity is a fraction of."""
        return counted(self.analyses[""], cap)

    def read(self, calibration: Iterable[Any] | None) -> Any:
        """The calibration batches, each of its tensors and constants.

        Raises:
            CalibrationError: one does not fit.
        """
        return read_batches(self.programs[""], calibration, self._device)

    def inputs(self, path: str, batches: Any) -> Any:
        """What the batches bring to the inputs of a program's graph, behind the programs that were put; none
        where the program has to stay as it is.
        """
        return batches

    def removed_by(self, plan: PruningPlan) -> dict[str, np.ndarray]:
        """For each program that a plan takes anything from, whether each channel number goes.

        Raises:
            PlanError: the plan is for another model.
        """
        plans.check_fingerprint(plan, plans.program_fingerprint(self.programs[""]))
        return {"": plans.gone_of(plan, self.analyses[""])}

    def put(self, path: str, decision: Decision, config: PruningConfig | None) -> None:
        """Carry out what was decided for a program, and put what comes of it into the program's place."""
        self._result = rewrite(self.programs[path], self.analyses[path], decision, config, self.clock)

    def result(self, config: PruningConfig | None) -> Result:
        """The smaller model, once all programs were put."""
        return self._result

    def check_weights(self) -> None:
        """Refuse weights without values.

        Raises:
            ArgumentError: names one.
        """
        for program in self.programs.values():
            for name, tensor in program.weights().items():
                if tensor.device.type == "meta":
                    raise ArgumentError(
                        f"'{name}' is on the meta device and has no values; analyze() works without weights,"
                        " prune() needs them"
                    )

    def served(self, budget: Budget) -> Budget:
        """The budget of the programs that the batches serve."""
        return budget.only(
            [path not in self.unserved for path, own in self.analyses.items() for _ in own.chosen]
        )

    def trial(self, trials: Mapping[str, ModelTrial]) -> ServedTrial | None:
        """What runs the programs as they would be pruned, if anything does."""
        return trials.get("")

    def split(self, lost: Sequence[int]) -> dict[str, list[int]]:
        """What the groups of each program lose, of what all groups do."""
        left = iter(lost)
        return {path: [next(left) for _ in own.chosen] for path, own in self.analyses.items()}


def analyze_for(program: Program, asked: PruningConfig | PruningPlan) -> Analysis:
    """The groups of a program at the granularities that are asked for, or that a plan was made with; fused
    weights are taken apart where they have to be.
    """
    return analyze_program(program, split_fused, asked.granularity, asked.include)


def make_plan(
    program: Program, analysis: Analysis, decision: Decision, result: str | None = None
) -> PruningPlan:
    """What was decided, as data; ``result`` is the fingerprint of what came of it."""
    entries = plans.planned(analysis.chosen, decision.gone, analysis)
    groups = tuple(entry for entry in entries if entry.removed_sets)
    return PruningPlan(
        plans.program_fingerprint(program),
        groups,
        Sparsity(analysis).removed([entry.removed_sets for entry in entries]),
        tuple(analysis.program.parts.values()) if groups else (),
        result,
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
    weights = dict(held.module.named_parameters(remove_duplicate=False))
    plan = make_plan(program, analysis, held.decision, plans.fingerprint(weights))
    report = make_report(
        analysis,
        plan,
        held.decision,
        program.parameters(),
        weights,
        config,
        clock.seconds,
        held.left,
    )
    cache = cache_bytes(program.module.graph, held.module.graph, program.state_outputs)
    report = replace(report, cache=cache, notes=(*report.notes, *held.notes))
    return Result(held.module, plan, report, program.signature)


__all__ = ["Subject", "Timings", "analyze_for", "make_plan", "rewrite"]
