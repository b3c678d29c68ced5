"""How far apart two values are, where one is what the other should be but for rounding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: differences below this part of the largest entry (of 1, if that is larger) are those of double precision
_NOISE = 1e-11
#: entries as large as another but for this part of it are alike; those this many times smaller are of another
#: order
_ALIKE, _FAR = 1e-6, 4096.0
#: elements compared at once
_CHUNK = 1 << 22


def deviation(found: Any, expected: Any) -> float:
    """``max|a − b| / max|b|`` of two outputs, where ``b`` leaves out fillings; infinite where they cannot be
    compared, or are integers that differ.
    """
    if not (isinstance(found, Tensor) and isinstance(expected, Tensor)):
        return 0.0 if type(found) is type(expected) and found == expected else math.inf
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return math.inf
    if found.layout != torch.strided or found.is_quantized:
        found, expected = (
            value.to_dense() if value.layout != torch.strided else value.dequantize()
            for value in (found, expected)
        )
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(found, expected) else math.inf
    return _apart(found.reshape(-1), expected.reshape(-1))


def _apart(found: Tensor, expected: Tensor) -> float:
    """The deviation of flat tensors of real or complex numbers.

    Entries that are the same to the bit and of another order than all that differ (masked scores of -1e9,
    say) do not set the scale: they take no part in what the others are computed of, and would hide whatever
    is wrong with those. So would fillings that were added to scores and rounded: entries as large as the
    largest, with nothing else of that order, have a scale of their own.
    """
    difference, whole, sizes = 0.0, 0.0, [0.0]
    for a, b in zip(found.split(_CHUNK), expected.split(_CHUNK)):
        odd = ~torch.isfinite(b)
        if bool(odd.any()):
            if not _same_oddities(a[odd], b[odd]):
                return math.inf
            a, b = a[~odd], b[~odd]
        if not bool(torch.isfinite(a).all()):
            return math.inf
        if not b.numel():
            continue
        a, b = (value if value.dtype.itemsize > 2 else value.float() for value in (a, b))
        apart, size = (a - b).abs(), b.abs()
        largest, top = float(apart.max()), float(size.max())
        whole, noise = max(whole, top), _NOISE * min(top, 1.0)
        if largest > noise:
            difference, size = max(difference, largest), torch.where(apart > noise, size, 0)
            top = float(size.max())
            sizes += [top, float(torch.where(size < top * (1 - _ALIKE), size, 0).max())]
    top = max(sizes)
    below = max((size for size in sizes if size < top * (1 - _ALIKE)), default=0.0)
    if not top:
        return difference / (min(whole, 1.0) or 1.0)
    if below >= top / _FAR:
        return difference / (whole if whole < _FAR * top else top)
    size = expected.abs()
    near = size < top * (1 - _ALIKE)
    far = (size <= top) & ~near
    filled = float((found[far] - expected[far]).abs().max()) / top
    return max(filled, _apart(found[near], expected[near]))


def _same_oddities(a: Tensor, b: Tensor) -> bool:
    """Whether NaN and infinities stand at the same places."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def distance(found: Tensor, expected: Tensor) -> float:
    """``‖a − b‖₂ / ‖b‖₂`` of two tensors of real numbers, over the entries that differ (see
    :func:`deviation`); infinite where shapes, or the places of NaN and infinities, differ.
    """
    finite = torch.isfinite(expected)
    if found.shape != expected.shape or not torch.equal(torch.isfinite(found), finite):
        return math.inf
    differ = finite & (found != expected)
    a, b = found[differ].double(), expected[differ].double()
    norm = float(b.norm())
    return float((a - b).norm()) / (norm or 1.0)


__all__ = ["deviation", "distance"]
