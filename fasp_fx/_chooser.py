"""Carry out a configuration on an analysed program: how much goes, and what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ._observe._marks import Marks
from ._observe._runner import Runner
from ._observe._visit import Decision, Observer
from ._selection import PartialBudget, check_patterns, held_by, lost_by_pattern, matches, read_by
from .allocation import Budget, uniform, validate
from .analysis import Analysis
from .config import PruningConfig
from .errors import NothingPrunableError
from .groups import Group
from .restoration import ridge
from .scoring import resolve


class Chooser:
    """Chooses by a configuration, for one program or for several after another."""

    def __init__(self, config: PruningConfig) -> None:
        self.config = config
        self._score, _ = resolve(config.score)
        self._restore = ridge if config.restore is not None else None

    def allocate(self, budget: Budget, groups: Sequence[Group]) -> list[int]:
        """How many channel sets each block of each of the budget's groups loses.

        Args:
            groups: all groups of the model, those that cannot be pruned among them.

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
        if not config.exclude:
            return self._allocated(budget)
        excluded = [any(matches(pattern, name) for pattern in config.exclude for name in held_by(group)) for group in budget.groups]
        if all(excluded):
            raise NothingPrunableError("every group that can be pruned is excluded; leave out some of exclude=")
        part = PartialBudget(budget, [not out for out in excluded])
        return part.spread(self._allocated(part))

    def _allocated(self, budget: Budget) -> list[int]:
        config = self.config
        if isinstance(config.sparsity, Mapping):
            return lost_by_pattern(budget, config.sparsity, config.round_to)
        allocation = config.allocation if callable(config.allocation) else uniform
        return validate(allocation(budget, config.sparsity, config.round_to), budget)

    def choose(self, analysis: Analysis, lost: list[int], batches: list[list[Any]] | None, advance: Callable[[float], None]) -> Decision:
        """Run the calibration batches, choose what goes and repair what stays."""
        runner = None if batches is None else Runner(analysis.program, batches)
        marks = None if batches is None else Marks(analysis.program, batches, self.config.padding_mask, hold_out=self._restore is not None)
        with torch.no_grad():
            return Observer(analysis, lost, self._score, self._restore, self.config.propagate).run(runner, marks, advance)


__all__ = ["Chooser"]
