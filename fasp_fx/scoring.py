"""Scores of channel sets. A score knows weights and norms, nothing of graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import ArgumentError


@dataclass(frozen=True)
class Columns:
    """One consumer's columns as a score sees them.

    Attributes:
        weight: the consumer as a matrix, shape ``[rows, columns]``.
        norms: ‖X_j‖₂ of each column's input over the calibration tokens, shape ``[columns]``; ``None`` if nothing was observed.
        gram: a function that returns XᵀX, shape ``[columns, columns]``; ``None`` if nothing was observed.
    """

    weight: Tensor
    norms: Tensor | None
    gram: Callable[[], Tensor] | None


#: a score maps one consumer to a value per column, shape ``[columns]``; values of coupled columns and of several consumers are added
Score = Callable[[Columns], Tensor]


def fasp(columns: Columns) -> Tensor:
    """``Σ_i |W_ij| · ‖X_j‖₂`` (FASP, arXiv 2501.09412, the column form of Wanda's metric)."""
    assert columns.norms is not None
    return columns.weight.abs().sum(0, dtype=columns.norms.dtype) * columns.norms


def magnitude(columns: Columns) -> Tensor:
    """``‖W_j‖₂``: the length of the column, without data."""
    return columns.weight.to(torch.float32).norm(dim=0).to(torch.float64)


class Random:
    """Uniform random scores, reproducible: the n-th consumer always gets the same."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, columns: Columns) -> Tensor:
        return torch.rand(columns.weight.shape[1], generator=self.generator, dtype=torch.float64).to(columns.weight.device)


def resolve(score: Literal["fasp", "magnitude", "random"] | Score) -> tuple[Score, bool]:
    """The score function and whether it needs calibration data (a callable is taken to need it).

    Raises:
        ArgumentError: an unknown name.
    """
    if callable(score):
        return score, True
    if score == "fasp":
        return fasp, True
    if score == "magnitude":
        return magnitude, False
    if score == "random":
        return Random(), False
    raise ArgumentError(f"score={score!r} is not known; use 'fasp', 'magnitude', 'random' or a callable from fasp_fx.scoring.Columns to a tensor")
