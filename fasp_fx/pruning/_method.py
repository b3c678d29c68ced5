"""What the names in a configuration stand for: score, allocation, loss and repair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..allocation._allocation import Allocation, CostAllocation, TrialAllocation
from ..base._device import device_of, multiplies_bfloat16
from ..base._offload import computing
from ..calibration.losses import Loss, resolve_loss
from ..calibration.obs import resolve_score
from ..calibration.restoration import Restore, restored_by, ridge
from ..calibration.scoring import ByColumns, GroupScore
from ..calibration.statistics import MakeStatistic
from ..capturing._program import Program
from ..errors import ArgumentError
from .config import PruningConfig


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
    loss: Literal["outputs", "next-token"] | Loss | None
    restore: Restore | None

    @classmethod
    def of(cls, config: PruningConfig, auto: Literal["outputs", "next-token"] = "outputs") -> Method:
        """The method that a configuration names; ``loss="auto"`` stands for ``auto``."""
        restore = restored_by(config.restore) if callable(config.restore) else ridge
        return cls(
            config,
            resolve_score(config.effective_score),
            config.allocator,
            auto if config.loss == "auto" else config.loss,
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
    def needs_costs(self) -> bool:
        """Whether the allocation wants cost curves."""
        return isinstance(self.allocation, CostAllocation)

    @property
    def runs_trials(self) -> bool:
        """Whether the allocation wants to run the model as it would be pruned."""
        return isinstance(self.allocation, TrialAllocation)

    @property
    def needs_measuring(self) -> bool:
        """Whether the dense model is observed before anything is chosen."""
        return self.needs_costs or (bool(self.gradients) and self.loss is not None)

    @property
    def is_of_columns(self) -> bool:
        """Whether the score is one of single columns, whose losses take less data to predict than those of
        whole groups.
        """
        return isinstance(self.score, ByColumns)

    @property
    def resolved_loss(self) -> Loss | None:
        """The function that the loss stands for."""
        return None if self.loss is None else resolve_loss(self.loss)

    @property
    def loss_description(self) -> str:
        """What costs are predictions of."""
        if self.loss is None:
            return "the relative squared errors of the consumers' outputs, added up"
        if callable(self.loss):
            return "the loss that was given"
        return {"next-token": "the cross-entropy of the next token"}.get(
            self.loss, "half the squared error of the outputs, relative to their mean square"
        )

    @property
    def score_name(self) -> str:
        """What tells the score from others; of one that nothing tells, a text that no score has."""
        try:
            return self.config.score_name
        except ArgumentError:
            return f"{type(self.score).__qualname__} ?"


def precision_of(program: Program) -> str:
    """That of products of float32 while a program runs on calibration data: the device's choice."""
    device = computing() or device_of(program.module)
    return "medium" if multiplies_bfloat16(device) else "highest"


__all__ = ["Method", "precision_of"]
