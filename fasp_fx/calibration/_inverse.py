"""The inverse of a damped Gram matrix, from which columns are eliminated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fasp_fx.errors import CalibrationError

from ._scoring import Columns
from ._statistics import add_product, diagonal_of, is_few, precise

#: the part of a Gram matrix's trace that rounding of its products stays below
ROUNDING = 8 * torch.finfo(torch.float32).eps
#: with so many times fewer tokens than columns, the tokens are less work than the matrix
_FEWER = 10


@dataclass
class Inverse:
    """``H = (G + δI)⁻¹``, up to its diagonal: what is above is not kept up to date."""

    matrix: Tensor

    def blocks(self, at: Tensor) -> Tensor:
        """The parts between some columns, ``[sets, columns, columns]`` for places ``[sets, columns]``."""
        one, other = at[:, :, None], at[:, None, :]
        return self.matrix[one.maximum(other), one.minimum(other)]

    def rows(self, places: Tensor) -> Tensor:
        """Whole rows, shape ``[places, columns]``."""
        below = torch.arange(len(self.matrix), device=places.device) <= places[:, None]
        return torch.where(below, self.matrix[places], self.matrix.index_select(1, places).T)

    def eliminate(self, places: Tensor, across: Tensor) -> None:
        """Take columns out: H becomes the inverse of what is left of G + δI.

        Args:
            across: ``L⁻¹ H_P`` for the rows H_P of the places and ``LLᵀ = H_PP``.
        """
        add_product(self.matrix, across, across, alpha=-1)

    def keep(self, places: Tensor) -> None:
        """Forget all other columns, which were eliminated."""
        self.matrix = self.matrix.index_select(0, places).index_select(1, places)


@dataclass
class _OfFew(Inverse):
    """The same as ``(I − SᵀS) / δ`` where G is XᵀX with few rows X: the matrix is ``S = L⁻¹ X`` with
    ``LLᵀ = XXᵀ + δI``, in high precision, since little is left of the unit matrix where a column is large.
    """

    raised: float
    dtype: torch.dtype

    def blocks(self, at: Tensor) -> Tensor:
        columns, unit = self.matrix.T[at], at[:, :, None] == at[:, None, :]
        return ((columns @ -columns.mT).add_(unit) / self.raised).to(self.dtype)

    def rows(self, places: Tensor) -> Tensor:
        unit = places[:, None] == torch.arange(self.matrix.shape[1], device=places.device)
        return ((-self.matrix[:, places].T @ self.matrix).add_(unit) / self.raised).to(self.dtype)

    def eliminate(self, places: Tensor, across: Tensor) -> None:
        columns = self.matrix[:, places]
        unit = torch.eye(len(columns), dtype=columns.dtype, device=columns.device)
        factor = raised_root(unit - columns @ columns.T, 0.0)
        self.matrix = torch.linalg.solve_triangular(factor, self.matrix, upper=False)

    def keep(self, places: Tensor) -> None:
        self.matrix = self.matrix.index_select(1, places)


def damped_inverse(columns: Columns, gram: Tensor, damping: float) -> Inverse:
    """``(G + δI)⁻¹`` of the columns; with few rows X that is ``(I − Xᵀ (XXᵀ + δI)⁻¹ X) / δ``.

    δ is ``damping`` of the mean of G's diagonal, but more than what rounding can have made of G, which adds
    up products of float32 or of less: where few columns are ever anything but zero, or what is left of them
    without their means is small beside the means, the damping alone would be lost in it.

    Args:
        columns: the block.
        gram: G, of which the means may have been taken out, or X; G's diagonal is raised in place.

    Raises:
        CalibrationError: G is not finite.
    """
    assert columns.norms is not None
    energy, mean = float(columns.norms.square().sum()), float(diagonal_of(gram).mean())
    raised = max(damping * mean, ROUNDING * energy) if energy != 0 else 1.0
    try:
        if not is_few(gram):
            return Inverse(torch.cholesky_inverse(raised_root(gram, raised)))
        x = gram.to(precise(gram.device))
        factor = raised_root(x @ x.T, raised)
    except CalibrationError as error:
        raise CalibrationError(f"what was seen at '{columns.name}' {error}") from None
    solved = torch.linalg.solve_triangular(factor, x, upper=False)
    if _FEWER * len(solved) <= solved.shape[1]:
        return _OfFew(solved, raised, gram.dtype)
    # Little is left of the unit matrix where a column is large: it is rounded after the difference.
    inverse = torch.eye(solved.shape[1], dtype=gram.dtype, device=gram.device)
    add_product(inverse, solved, solved, alpha=-1)
    return Inverse(inverse.div_(raised))


def raised_root(matrix: Tensor, raised: float) -> Tensor:
    """L with ``LLᵀ = M + δI``, lower triangular, for the first sum δ of ``raised``, ten times that and so on
    that leaves it positive; the diagonal of M is raised in place.

    Raises:
        CalibrationError: M is not finite.
    """
    while math.isfinite(raised):
        matrix.diagonal().add_(raised)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            return factor
        raised = 10 * raised or ROUNDING * float(matrix.diagonal().abs().mean()) or 1.0
    raise CalibrationError("is not finite; check the calibration data and the model's dtype")
