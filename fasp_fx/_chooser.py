"""Carry out a configuration on an analysed program: how much goes, and what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ._observe._consumers import Consumers
from ._observe._costs import curves_of
from ._observe._gradients import observe_batches
from ._observe._marks import Marks
from ._observe._runner import Runner
from ._observe._visit import Decision, Observer
from ._selection import PartialBudget, check_patterns, held_by, lost_by_pattern, matches, read_by
from .allocation import Budget, CostAllocation, check_reach, validate
from .analysis import Analysis
from .config import PruningConfig
from .costs import Costs
from .errors import NothingPrunableError
from .groups import Group
from .losses import resolve_loss
from .obs import OBS
from .restoration import ridge
from .scoring import resolve

#: one in so many calibration batches is run back for gradients, and shows the dense model's activations to cost curves
MEASURED = 8


class Chooser:
    """Chooses by a configuration, for one program or for several after another."""

    def __init__(self, config: PruningConfig) -> None:
        self.config = config
        self._score = resolve(config.score)
        self._restore = ridge if config.restore is not None else None
        self._gradients = {name: make for name, make in self._score.statistics.items() if getattr(make, "needs_gradient", False)}

    def check(self, budget: Budget, groups: Sequence[Group]) -> None:
        """Refuse what can be known to be in vain before the costs are measured; arguments and errors as for :meth:`allocate`."""
        if not self.config.needs_costs or not budget.groups:
            self.allocate(budget, groups, None)
        else:
            check_patterns("exclude", self.config.exclude, groups, held_by)
            check_reach(self._part(budget), float(self.config.sparsity), self.config.round_to)  # type: ignore[arg-type]

    def measure(self, analysis: Analysis, batches: list[list[Any]], fingerprint: str, consumers: Consumers, advance: Callable[[float], None]) -> Costs | None:
        """Observe the dense model, forward and, where there is a loss, back: the cost curves if the allocation wants them, and gradients for the score.

        Args:
            batches: of calibration; the first eighth of them serves.
            consumers: those of the analysis; what needs gradients stays with them.
        """
        config = self.config
        wanted = {**self._score.statistics, **OBS.statistics} if config.needs_costs else self._gradients
        if not config.needs_costs and (not self._gradients or config.loss is None):
            return None
        some = batches[: max(1, len(batches) // MEASURED)]
        marks = Marks(analysis.program, some, config.padding_mask, hold_out=False)
        loss = None if config.loss is None else resolve_loss(config.loss)
        observe_batches(consumers, some, wanted, loss, marks, advance)
        with torch.no_grad():
            costs = Costs(curves_of(consumers, analysis.chosen, self._score), fingerprint) if config.needs_costs else None
        consumers.forget_activations()
        return costs

    def allocate(self, budget: Budget, groups: Sequence[Group], costs: Costs | None) -> list[int]:
        """How many channel sets each block of each of the budget's groups loses.

        Args:
            groups: all groups of the model, those that cannot be pruned among them.
            costs: the cost curves, where the allocation wants them.

        Raises:
            NothingPrunableError: no group can be pruned.
            ArgumentError: a name pattern matches nothing, or the allocation returned what cannot be done.
            SparsityError: the sparsity is out of reach.
        """
        config = self.config
        check_patterns("exclude", config.exclude, groups, held_by)
        if not budget.groups:
            reasons = sorted({group.reason for group in groups if group.reason})
            raise NothingPrunableError("no group of this model can be pruned: " + ("; ".join(reasons) if reasons else "it has no coupled weights"))
        if isinstance(config.sparsity, Mapping):
            check_patterns("sparsity", config.sparsity, groups, read_by)
        part = self._part(budget)
        lost = self._allocated(part, costs)
        return part.spread(lost) if isinstance(part, PartialBudget) else lost

    def _part(self, budget: Budget) -> Budget:
        """The budget of the groups that are not excluded."""
        if not self.config.exclude:
            return budget
        excluded = [any(matches(pattern, name) for pattern in self.config.exclude for name in held_by(group)) for group in budget.groups]
        if all(excluded):
            raise NothingPrunableError("every group that can be pruned is excluded; leave out some of exclude=")
        return PartialBudget(budget, [not out for out in excluded])

    def _allocated(self, budget: Budget, costs: Costs | None) -> list[int]:
        config = self.config
        if isinstance(config.sparsity, Mapping):
            return lost_by_pattern(budget, config.sparsity, config.round_to)
        allocate = config.allocator
        if isinstance(allocate, CostAllocation):
            assert costs is not None
            return validate(allocate(budget, config.sparsity, config.round_to, costs), budget)
        return validate(allocate(budget, config.sparsity, config.round_to), budget)

    def choose(self, consumers: Consumers, lost: list[int], batches: list[list[Any]] | None, advance: Callable[[float], None]) -> Decision:
        """Run the calibration batches, choose what goes and repair what stays."""
        analysis = consumers.analysis
        runner = None if batches is None else Runner(analysis.program, batches)
        marks = None if batches is None else Marks(analysis.program, batches, self.config.padding_mask, hold_out=self._restore is not None)
        with torch.no_grad():
            return Observer(consumers, lost, self._score, self._restore, self.config.propagate).run(runner, marks, advance)


__all__ = ["Chooser"]
