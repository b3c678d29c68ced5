"""What is pruned: the programs that a model was captured as, by path; ``""`` is the model itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from ._allocating import budget_for, counted
from ._method import Method
from ._result import Result
from ._rewriting import Timings, analyze_for, rewrite
from .config import PruningConfig


class Subject(ABC):
    """A model on its way to a smaller one.

    Attributes:
        programs: what it was captured as, in the order in which the model runs them.
        analyses: those of the programs that are pruned, once :meth:`analyze` was called.
        notes: what there is to say of all programs together.
    """

    def __init__(self, programs: Mapping[str, Program]) -> None:
        self.programs = dict(programs)
        self.analyses: dict[str, Analysis] = {}
        self.notes: list[str] = []

    @abstractmethod
    def analyze(self, asked: PruningConfig | PruningPlan) -> Analysis:
        """The groups of all programs, in the names of the model."""

    @abstractmethod
    def within(self, path: str, group: Group) -> Group:
        """A group of a program in the names of the model."""

    @abstractmethod
    def fingerprint(self) -> str:
        """What tells the model, with its weights, from others."""

    @abstractmethod
    def count(self, cap: Cap | None) -> Resource:
        """What a budget counts, of all programs together; ``None``: what sparsity is a fraction of."""

    @abstractmethod
    def read(self, calibration: Iterable[Any] | None) -> Any:
        """The calibration batches.

        Raises:
            CalibrationError: one does not fit.
        """

    @abstractmethod
    def leaves(self, batches: Any) -> Iterable[Iterable[Any]]:
        """The tensors and constants of each batch."""

    @abstractmethod
    def inputs(self, path: str, batches: Any) -> tuple[list[list[Any]], str]:
        """What the batches bring to the inputs of a program's graph, behind the programs that were put; and
        why it is nothing, if it is.
        """

    @abstractmethod
    def removed_by(self, plan: PruningPlan) -> dict[str, np.ndarray]:
        """For each program that a plan takes anything from, whether each channel number goes.

        Raises:
            PlanError: the plan is for another model.
        """

    @abstractmethod
    def put(self, path: str, decision: Decision, config: PruningConfig | None, clock: Timings) -> None:
        """Carry out what was decided for a program, and put what comes of it into the program's place."""

    @abstractmethod
    def result(self, config: PruningConfig | None, clock: Timings) -> Result:
        """The smaller model, once all programs were put."""

    def unreached(self, batches: Any) -> dict[str, str]:
        """The programs that the batches bring nothing to, with the reasons."""
        return {}

    def leaves_whole(
        self, path: str, lost: list[int], config: PruningConfig, batches: Any, missed: Mapping[str, str]
    ) -> bool:
        """Whether a program stays as it is, which is noted then."""
        return False

    def take_notes(self, decision: Decision, notes: Iterable[str]) -> None:
        """Note what there is to say of all programs together."""
        self.notes = list(notes)

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

    def budget(self, method: Method) -> Budget:
        """How much of what was asked for may stay; without a limit where each pattern has its own sparsity.

        Raises:
            BudgetError: a resource cannot be counted.
        """
        return budget_for(method.config, list(self._chosen()), self.count)

    def reached(self, budget: Budget, missed: Mapping[str, str]) -> Budget:
        """The budget of the programs that the batches serve."""
        if not missed:
            return budget
        return budget.only([path not in missed for path, own in self.analyses.items() for _ in own.chosen])

    def trial(self, trials: Mapping[str, ModelTrial]) -> ServedTrial | None:
        """What runs the programs as they would be pruned, if anything does."""
        return trials.get("")

    def split(self, lost: Sequence[int]) -> dict[str, list[int]]:
        """What the groups of each program lose, of what all groups do."""
        left = iter(lost)
        return {path: [next(left) for _ in own.chosen] for path, own in self.analyses.items()}

    def _chosen(self) -> Iterator[Group]:
        for path, analysis in self.analyses.items():
            yield from (self.within(path, group) for group in analysis.chosen)


class Whole(Subject):
    """A model that was captured as one program.

    Args:
        device: where batches are moved.
    """

    def __init__(self, program: Program, device: torch.device | str | None = None) -> None:
        super().__init__({"": program})
        self.program, self._device = program, None if device is None else device_named(device)

    def analyze(self, asked: PruningConfig | PruningPlan) -> Analysis:
        analysis = analyze_for(self.program, asked)
        self.analyses = {"": analysis}
        return analysis

    def within(self, path: str, group: Group) -> Group:
        return group

    def fingerprint(self) -> str:
        return plans.computed_fingerprint(self.program)

    def count(self, cap: Cap | None) -> Resource:
        return counted(self.analyses[""], cap)

    def read(self, calibration: Iterable[Any] | None) -> list[list[Any]]:
        return read_batches(self.program, calibration, self._device)

    def leaves(self, batches: list[list[Any]]) -> list[list[Any]]:
        return batches

    def inputs(self, path: str, batches: list[list[Any]]) -> tuple[list[list[Any]], str]:
        return batches, ""

    def removed_by(self, plan: PruningPlan) -> dict[str, np.ndarray]:
        plans.check_fingerprint(plan, plans.program_fingerprint(self.program))
        return {"": plans.gone_of(plan, self.analyses[""])}

    def take_notes(self, decision: Decision, notes: Iterable[str]) -> None:
        decision.notes.extend(notes)

    def put(self, path: str, decision: Decision, config: PruningConfig | None, clock: Timings) -> None:
        self._result = rewrite(self.program, self.analyses[""], decision, config, clock)

    def result(self, config: PruningConfig | None, clock: Timings) -> Result:
        return self._result


__all__ = ["Subject", "Whole"]
