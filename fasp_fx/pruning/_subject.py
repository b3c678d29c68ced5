"""What is pruned: the programs that a model was captured as, by path (``""`` is the model itself); and how
one becomes smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fasp_fx.allocation import Cap, counted
from fasp_fx.analysis import (
    Analysis,
    PruningPlan,
    Resource,
    Sparsity,
    analyze_program,
    check_fingerprint,
    computed_fingerprint,
    fixed_of,
    planned,
    program_fingerprint,
)
from fasp_fx.base import device_named, fingerprint
from fasp_fx.calibration import Candidates, Decision, ModelTrial, read_batches
from fasp_fx.capturing import Program
from fasp_fx.errors import ArgumentError
from fasp_fx.passes import split_fused

from ._config import PruningConfig
from ._report import make_report
from ._result import Result
from .check import Checker


def check_weights(programs: Iterable[Program]) -> None:
    """Refuse weights without values.

    Raises:
        ArgumentError: names one.
    """
    for program in programs:
        for name, tensor in program.weights().items():
            if tensor.device.type == "meta":
                raise ArgumentError(
                    f"'{name}' is on the meta device and has no values; analyze() works without weights,"
                    " prune() needs them"
                )


def split(analyses: Mapping[str, Analysis], lost: Sequence[int]) -> dict[str, list[int]]:
    """What the groups of each of some programs lose, of what all groups do."""
    counts = iter(lost)
    return {path: [next(counts) for _ in part.chosen] for path, part in analyses.items()}


class Whole:
    """A model on its way to a smaller one, captured as one program.

    Args:
        program: that.
        device: where batches are moved.

    Attributes:
        programs: what it was captured as, by path, in the order in which the model runs them.
        analyses: those of the programs that are pruned, once :meth:`analyze` was called.
        notes: what there is to say of all programs together.
    """

    def __init__(self, program: Program, device: torch.device | str | None = None) -> None:
        self.programs, self._device = {"": program}, None if device is None else device_named(device)
        self.analyses: dict[str, Analysis] = {}
        self.notes: list[str] = []

    def analyze(self, asked: PruningConfig) -> Analysis:
        """The groups of all programs, in the names of the model."""
        self.analyses = {"": analyze_for(self.programs[""], asked)}
        return self.analyses[""]

    def fingerprint(self) -> str:
        """What tells the model, with its weights, from others."""
        return computed_fingerprint(self.programs[""])

    def count(self, cap: Cap | None) -> Resource:
        """What a budget counts, of all programs together; ``None``: what sparsity is a fraction of."""
        return counted(self.analyses[""], cap)

    def apart(self, plan: PruningPlan) -> dict[str, PruningPlan]:
        """What a plan says of each program that loses anything, in the program's names.

        Raises:
            PlanError: the plan is for another model.
        """
        check_fingerprint(plan, program_fingerprint(self.programs[""]))
        return {"": plan}

    def read(self, calibration: Iterable[Any] | None) -> Any:
        """The calibration batches, each of its tensors and constants.

        Raises:
            CalibrationError: one does not fit.
        """
        return read_batches(self.programs[""], calibration, self._device)

    def served(self) -> list[str]:
        """The programs that the batches serve, once :meth:`read` was called."""
        return [""]

    def inputs(self, path: str, batches: Any) -> Any:
        """What the batches bring to the inputs of a program's graph, behind the programs that were put; none
        where the program has to stay as it is.
        """
        return batches

    def trial(self, trials: Mapping[str, ModelTrial]) -> Candidates | None:
        """What runs the programs as they would be pruned, if anything does."""
        return trials.get("")

    def put(self, path: str, decision: Decision, config: PruningConfig | None) -> None:
        """Carry out what was decided for a program, and put what comes of it into the program's place."""
        self._result = rewrite(self.programs[""], self.analyses[""], decision, config)

    def result(self, config: PruningConfig | None) -> Result:
        """The smaller model, once all programs were put."""
        return self._result


def analyze_for(program: Program, asked: PruningConfig | PruningPlan) -> Analysis:
    """The groups of a program at the granularities that are asked for, or that a plan was made with; fused
    weights are taken apart where they have to be.
    """
    return analyze_program(program, split_fused, asked.granularity, asked.include)


def make_plan(
    program: Program, analysis: Analysis, decision: Decision, result: str | None = None
) -> PruningPlan:
    """What was decided, as data; ``result`` is the fingerprint of what came of it."""
    entries = planned(analysis.chosen, decision.gone, analysis)
    groups = tuple(entry for entry in entries if entry.removed_sets)
    return PruningPlan(
        program_fingerprint(program),
        groups,
        Sparsity(analysis).removed([entry.removed_sets for entry in entries]),
        tuple(analysis.program.parts.values()) if groups else (),
        result,
        granularity=tuple(sorted(analysis.granularity)),
        include=tuple(sorted(analysis.include)),
        folds=program.folds,
        fixed=fixed_of(program),
    )


def rewrite(
    program: Program,
    analysis: Analysis,
    decision: Decision,
    config: PruningConfig | None = None,
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
    checked = Checker(program, analysis, decision).run(whole)
    weights = dict(checked.module.named_parameters(remove_duplicate=False))
    plan = make_plan(program, analysis, checked.decision, fingerprint(weights))
    return Result(
        checked.module,
        plan,
        make_report(analysis, plan, checked, program.parameters(), weights, config),
        program.signature,
    )
