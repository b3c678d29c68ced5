"""Two kinds of gates: sampled ones under a Lagrangian, and ones that are projected onto the budget in every
step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ...base._options import is_number
from ...errors import ArgumentError

#: how far a concrete variable is stretched beyond 0 and 1 before it is cut off there
_LOW, _HIGH = -0.1, 1.1
_EDGE = 1e-6


class Kind(ABC):
    """How gates are drawn from scores. Derive from it for one of your own.

    Attributes:
        start: the score that every gate begins with.
    """

    start: float

    @abstractmethod
    def draw(self, scores: Tensor, stays: Tensor) -> Tensor:
        """The gates of a group for one training step, shape ``[sets]``.

        Args:
            scores: what is learned, shape ``[sets]``.
            stays: which channel sets the plan of these scores keeps.
        """

    def draw_coarse(self, scores: Tensor, coarse: Tensor, stays: Tensor) -> Tensor:
        """The gates of a group that has one of its own as a whole, shape ``[sets]``: the product of the two.

        Args:
            scores: of its channel sets, shape ``[sets]``.
            coarse: of the group, without dimensions.
            stays: which channel sets the plan of these scores keeps.
        """
        return self.draw(scores, stays) * self.draw(coarse, stays.any())

    @abstractmethod
    def chances(self, scores: Tensor) -> Tensor:
        """How probable it is that each gate is open: the lower, the sooner its channel set goes."""

    @property
    def is_exact(self) -> bool:
        """Whether what is drawn meets the budget by itself, so that no penalty is wanted."""
        return False


def _check(**values: float) -> None:
    for name, value in values.items():
        if not is_number(value) or not math.isfinite(value) or not value > 0:
            raise ArgumentError(f"{name}={value!r} is not a positive number")


@dataclass(frozen=True)
class HardConcrete(Kind):
    """Stretched and cut binary concrete variables (Louizos et al., arXiv 1712.01312), as in FLOP (1910.04732)
    and CoFi (2204.00408).

    With u drawn evenly from (0, 1), ``z = clamp(1.2 σ((ln u − ln(1 − u) + a)/β) − 0.1, 0, 1)`` for the score
    a; a gate is open with the chance ``σ(a − β ln(0.1/1.1))``. A Lagrangian brings the expected size to the
    budget (:meth:`fasp_fx.gates.Gates.penalty`).

    Args:
        temperature: β.
        start: the score that every gate begins with; 2.5 means that nearly all are open.

    Raises:
        ArgumentError: one of them is not a positive number.
    """

    temperature: float = 2 / 3
    start: float = 2.5

    def __post_init__(self) -> None:
        _check(temperature=self.temperature, start=self.start)

    def draw(self, scores: Tensor, stays: Tensor) -> Tensor:
        u = torch.rand_like(scores).clamp(_EDGE, 1 - _EDGE)
        concrete = torch.sigmoid((u.log() - (1 - u).log() + scores) / self.temperature)
        return (concrete * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def chances(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores - self.temperature * math.log(-_LOW / _HIGH))


@dataclass(frozen=True)
class Projected(Kind):
    """Hard masks that meet the budget in every step, with gradients that pass straight through (GRASPrune,
    arXiv 2604.19398; DDP, 2603.08065).

    Forward, the channel sets that the plan of the scores keeps have the gate 1 and all others 0; backward, a
    gate is ``σ(a/τ)`` for the score a.

    Args:
        temperature: τ.
        start: the score that every gate begins with.

    Raises:
        ArgumentError: one of them is not a positive number.
    """

    temperature: float = 1.5
    start: float = 1.0

    def __post_init__(self) -> None:
        _check(temperature=self.temperature, start=self.start)

    def draw(self, scores: Tensor, stays: Tensor) -> Tensor:
        return _straight_through(self.chances(scores), stays)

    def draw_coarse(self, scores: Tensor, coarse: Tensor, stays: Tensor) -> Tensor:
        # Of a product of two masks neither has a gradient where both are zero, and no block would come back.
        return _straight_through(self.chances(scores) * self.chances(coarse), stays)

    def chances(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores / self.temperature)

    @property
    def is_exact(self) -> bool:
        return True


def _straight_through(soft: Tensor, stays: Tensor) -> Tensor:
    """A mask whose gradient is that of soft gates."""
    return stays.to(soft) + soft - soft.detach()


__all__ = ["HardConcrete", "Kind", "Projected"]
