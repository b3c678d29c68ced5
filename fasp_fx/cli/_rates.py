"""How many floating-point operations a second this machine does, measured on matrices of the size that a
model has.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..base._device import float32_products

#: seconds for which each kind of operation is measured
_SECONDS = 1.0
#: no larger ones are needed to reach the rate: products have it soon, factorisations late
_LARGEST, _LARGEST_FACTORED = 2048, 8192
#: bytes that are copied to see how fast that is
_COPIED = 2**27


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


def factorisation_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second in Cholesky factorisations."""
    size = min(size, _LARGEST_FACTORED)
    matrix = torch.rand(size, size, dtype=dtype, device=device)
    matrix.diagonal().add_(size)  # of which the lower triangle is read
    return size**3 / 3.0 / _seconds(lambda: torch.linalg.cholesky_ex(matrix)[0])


def copy_rate(device: torch.device) -> float:
    """Bytes a second that are copied into memory that was not used before."""
    values = torch.zeros(_COPIED, dtype=torch.uint8, device=device)
    return _COPIED / _seconds(values.clone)


def _seconds(work: Callable[[], Tensor]) -> float:
    """The time that something takes once it has been done before."""
    work()[..., -1].sum().item()
    began, count = time.perf_counter(), 0
    while count < 1 or time.perf_counter() - began < _SECONDS:
        work().reshape(-1)[0].item()  # waits for an accelerator
        count += 1
    return (time.perf_counter() - began) / count


__all__ = ["copy_rate", "factorisation_rate", "product_rate"]
