"""Least-squares restoration of a consumer on the columns that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import precise

#: δ relative to the mean of the Gram matrix's diagonal
DAMPING = 1e-4


@dataclass(frozen=True)
class Restored:
    """The outcome for one consumer.

    Attributes:
        weight: shape ``[rows, columns]``, zero in the removed columns.
        error_before: ‖X(W − W₀)ᵀ‖²_F / ‖XWᵀ‖²_F where W₀ is W with the removed columns zero.
        error_after: the same for ``weight``.
        used: whether the solve was better than leaving the kept columns as they are.
    """

    weight: Tensor
    error_before: float
    error_after: float
    used: bool


def together(blocks: Sequence[Restored]) -> Restored:
    """The outcome for a consumer of several blocks: weight ``[blocks, rows, columns]``, errors averaged over the blocks."""
    count = len(blocks)
    return Restored(
        torch.stack([block.weight for block in blocks]),
        sum(block.error_before for block in blocks) / count,
        sum(block.error_after for block in blocks) / count,
        any(block.used for block in blocks),
    )


def relative_error(weight: Tensor, changed: Tensor, gram: Tensor) -> float:
    """‖X(W − V)ᵀ‖²_F / ‖XWᵀ‖²_F from the Gram matrix alone."""
    difference = changed - weight
    total = float(((weight @ gram) * weight).sum())
    return float(((difference @ gram) * difference).sum().clamp_min(0)) / total if total > 0 else 0.0


def least_squares(weight: Tensor, gram: Tensor, kept: Tensor) -> Restored:
    """``W* = W G[:, M] (G[M, M] + δI)⁻¹`` with δ = 1e-4 · mean(diag G) (FASP, arXiv 2501.09412, the restoration of section 3).

    One Cholesky factorisation in float64. If the result has a larger error on the calibration data than the kept columns left as they
    are, those are returned.

    Args:
        weight: shape ``[rows, columns]``.
        gram: XᵀX, shape ``[columns, columns]``, symmetric.
        kept: M, the indices of kept columns, shape ``[kept]``.
    """
    dtype = precise(weight.device)
    full, gram = weight.to(dtype), gram.to(dtype)
    plain = torch.zeros_like(full)
    plain[:, kept] = full[:, kept]
    before = relative_error(full, plain, gram)
    damping = DAMPING * gram.diagonal().mean()
    inner = gram[kept][:, kept]
    inner.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(inner)
    if int(failed) or not bool(torch.isfinite(factor).all()):
        return Restored(plain.to(weight.dtype), before, before, False)
    solved = torch.zeros_like(full)
    solved[:, kept] = torch.cholesky_solve((full @ gram[:, kept]).T, factor).T
    solved = solved.to(weight.dtype).to(dtype)  # judged as it will be stored
    after = relative_error(full, solved, gram)
    if not after < before:
        return Restored(plain.to(weight.dtype), before, before, False)
    return Restored(solved.to(weight.dtype), before, after, True)
