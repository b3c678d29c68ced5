"""How a configuration has channels chosen, and repairs what stays: what its names stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fasp_fx.allocation import Allocation, CostAllocation, Global, Search, uniform
from fasp_fx.base import computing, device_of, multiplies_bfloat16
from fasp_fx.calibration import (
    GroupScore,
    Loss,
    MakeStatistic,
    Outputs,
    Restore,
    next_token,
    resolve_loss,
    resolve_score,
    restored_by,
    ridge,
)
from fasp_fx.capturing import Program

from ._config import PruningConfig


@dataclass(frozen=True)
class Method:
    """How channels are chosen, and what stays is repaired.

    Attributes:
        config: what was asked for.
        loss: what is predicted by gradients; ``None``: nothing is, and consumers count by their own outputs.
        restore: repairs a consumer; ``None``: what stays is left as it is.
    """

    config: PruningConfig
    score: GroupScore
    allocation: Allocation
    loss: Loss | None
    restore: Restore | None

    @classmethod
    def of(cls, config: PruningConfig, auto: Literal["outputs", "next-token"] = "outputs") -> Method:
        """The method that a configuration names; ``loss="auto"`` stands for ``auto``."""
        restore = restored_by(config.restore) if callable(config.restore) else ridge
        return cls(
            config,
            resolve_score(config.effective_score),
            allocation_of(config),
            None if config.loss is None else resolve_loss(auto if config.loss == "auto" else config.loss),
            None if config.restore is None else restore,
        )

    @property
    def gradients(self) -> dict[str, MakeStatistic]:
        """The statistics of gradients that the score wants."""
        return {
            name: make
            for name, make in self.score.statistics.items()
            if getattr(make, "needs_gradient", False)
        }

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is needed."""
        return self.score.needs_data or self.restore is not None or self.needs_costs

    @property
    def needs_costs(self) -> bool:
        """Whether the allocation wants cost curves."""
        return isinstance(self.allocation, CostAllocation)

    @property
    def runs_trials(self) -> bool:
        """Whether the allocation wants to run the model as it would be pruned."""
        return isinstance(self.allocation, Search)

    @property
    def needs_measuring(self) -> bool:
        """Whether the dense model is observed before anything is chosen."""
        return self.needs_costs or (bool(self.gradients) and self.loss is not None)

    @property
    def loss_description(self) -> str:
        """What costs are predictions of."""
        if self.loss is None:
            return "the relative squared errors of the consumers' outputs, added up"
        if isinstance(self.loss, Outputs):
            return "half the squared error of the outputs, relative to their mean square"
        return "the cross-entropy of the next token" if self.loss is next_token else "the loss that was given"


def allocation_of(config: PruningConfig) -> Allocation:
    """The function that an allocation stands for."""
    if callable(config.allocation):
        return config.allocation
    if config.allocation == "search":
        return Search()
    is_global = (
        config.effective_score == "obs" and not isinstance(config.sparsity, Mapping)
        if config.allocation is None
        else config.allocation == "global"
    )
    return Global() if is_global else uniform


def precision_of(program: Program) -> str:
    """That of products of float32 while a program runs on calibration data: the device's choice."""
    device = computing() or device_of(program.module)
    return "medium" if multiplies_bfloat16(device) else "highest"
