"""What is pruned: the programs that a model was captured as, by path; ``""`` is the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..allocation._limits import Budget
from ..allocation.budgets import Cap
from ..analysis import plan as plans
from ..analysis._analysis import Analysis
from ..analysis.groups import Group
from ..analysis.plan import PruningPlan
from ..analysis.resources import Resource
from ..base._device import device_named
from ..calibration._calibration import read_batches
from ..calibration._trial import ModelTrial, ServedTrial
from ..calibration._visit import Decision
from ..capturing._program import Program
from ..errors import ArgumentError
from ._allocating import counted
from ._result import Result
from ._rewriting import Timings, analyze_for, rewrite
from .config import PruningConfig


class Subject:
    """A model on its way to a smaller one; captured as one program, unless a subclass says otherwise.

    Args:
        programs: what it was captured as, in the order in which the model runs them.
        device: where batches are moved.

    Attributes:
        analyses: those of the programs that are pruned, once :meth:`analyze` was called.
        unserved: the programs that the calibration batches do not serve, once :meth:`read` was called.
        notes: what there is to say of all programs together.
    """

    def __init__(self, programs: Mapping[str, Program], device: torch.device | str | None = None) -> None:
        self.programs, self._device = dict(programs), None if device is None else device_named(device)
        self.analyses: dict[str, Analysis] = {}
        self.unserved: set[str] = set()
        self.notes: list[str] = []

    def analyze(self, asked: PruningConfig | PruningPlan) -> Analysis:
        """The groups of all programs, in the names of the model."""
        self.analyses = {path: analyze_for(program, asked) for path, program in self.programs.items()}
        return self.analyses[""]

    def within(self, path: str, group: Group) -> Group:
        """A group of a program in the names of the model."""
        return group

    def fingerprint(self) -> str:
        """What tells the model, with its weights, from others."""
        return plans.computed_fingerprint(self.programs[""])

    def count(self, cap: Cap | None) -> Resource:
        """What a budget counts, of all programs together; ``None``: what sparsity is a fraction of."""
        return counted(self.analyses[""], cap)

    def read(self, calibration: Iterable[Any] | None) -> Any:
        """The calibration batches.

        Raises:
            CalibrationError: one does not fit.
        """
        return read_batches(self.programs[""], calibration, self._device)

    def leaves(self, batches: Any) -> Any:
        """The tensors and constants of each batch."""
        return batches

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

    def leaves_whole(self, path: str, lost: Sequence[int]) -> bool:
        """Whether a program of which so much shall go stays as it is."""
        return False

    def put(self, path: str, decision: Decision, config: PruningConfig | None, clock: Timings) -> None:
        """Carry out what was decided for a program, and put what comes of it into the program's place."""
        self._result = rewrite(self.programs[path], self.analyses[path], decision, config, clock)

    def result(self, config: PruningConfig | None, clock: Timings) -> Result:
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
        if not self.unserved:
            return budget
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

    def chosen(self) -> list[Group]:
        """The groups that can be pruned of all programs, in the names of the model."""
        return [self.within(path, group) for path, own in self.analyses.items() for group in own.chosen]


__all__ = ["Subject"]
