"""How many floating-point operations a second this machine does, measured on matrices of the size that a
model has.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from .._device import float32_products

#: seconds for which each kind of operation is measured
_SECONDS = 1.0
#: no larger ones are needed to reach the rate
_LARGEST = 2048


def product_rate(
    rows: int, inner: int, columns: int, dtype: torch.dtype, precision: str, device: torch.device
) -> float:
    """Operations a second in products ``[rows, inner] @ [inner, columns]``."""
    rows, inner, columns = (min(size, _LARGEST) for size in (rows, inner, columns))
    a, b = (
        torch.randn(rows, inner, dtype=dtype, device=device),
        torch.randn(inner, columns, dtype=dtype, device=device),
    )
    with torch.no_grad(), float32_products(precision):
        return 2.0 * rows * inner * columns / _seconds(lambda: a @ b)


def solve_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second in Cholesky factorisations."""
    size = min(size, _LARGEST)
    matrix = torch.eye(size, dtype=dtype, device=device) * size + torch.rand(
        size, size, dtype=dtype, device=device
    )
    matrix = matrix + matrix.T
    return size**3 / 3.0 / _seconds(lambda: torch.linalg.cholesky(matrix))


def _seconds(work: Callable[[], Tensor]) -> float:
    """The time that something takes once it has been done before."""
    work().sum().item()
    began, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - began < _SECONDS:
        work().reshape(-1)[0].item()  # waits for an accelerator
        count += 1
    return (time.perf_counter() - began) / count


__all__ = ["product_rate", "solve_rate"]
