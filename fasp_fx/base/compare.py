"""How far apart two values are, where one is what the other should be but for rounding, and how far apart
they may be for what purpose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: how far apart values may be, by purpose, in float64, float32, float16, and bfloat16 or less
TOLERANCE: dict[str, tuple[float, float, float, float]] = {
    # max|a − b| / max|b| that sums of thousands of addends in another order stay below; types of 16 bits
    # round every result
    "sums in another order": (1e-6, 2e-5, 4e-3, 3.2e-2),
    # the same where nothing runs in a higher precision
    "no higher precision": (1e-6, 1e-4, 4e-3, 3.2e-2),
    # of weights that are computed in every call, and were computed once
    "computed weights": (1.5e-14, 8e-6, 6.3e-2, 0.5),
    # of outputs before and after a pass that changes no values: the root of the precision
    "foreign pass": (1.5e-8, 3.5e-4, 3.2e-2, 8.9e-2),
    # of what one model computes in two ways; those of float64 compute some steps in float32
    "two ways": (1e-5, 1e-3, 5e-2, 5e-2),
    # ‖a − b‖₂ / ‖b‖₂ of a model and its graph
    "capture": (1e-8, 1e-3, 1e-1, 1e-1),
    # the same of a checkpoint and the model that it is to be
    "checkpoint": (4e-10, 7e-5, 1.6e-2, 5.5e-2),
}


def tolerance(purpose: str, dtype: torch.dtype) -> float:
    """How far apart values of a type may be (:data:`TOLERANCE`); 0 for integers."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    eps = torch.finfo(dtype).eps
    finer = sum(eps > torch.finfo(kind).eps for kind in (torch.float64, torch.float32, torch.float16))
    return TOLERANCE[purpose][finer]


#: differences below this part of the largest entry (of 1, if that is larger) are those of double precision
_NOISE = 1e-11
#: fillings are at least this large
_LARGE = 1e4
#: entries as large as another but for this part of it are alike; those this many times smaller are of another
#: order
_ALIKE, _FAR = 1e-3, 4096.0
#: elements compared at once: few enough to stay in the cache of a core
_CHUNK = 1 << 18


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

    Fillings (masked scores of -1e9, say) take no part in what the others are computed of, and would hide
    whatever is wrong with those. They are large, and either as large as each other, with nothing else of that
    order (which have a scale of their own), or the same to the bit and of another order than all that differ
    (which then do not set the scale).
    """
    difference = differing = 0.0
    sizes = [0.0]
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
        top, largest = float(size.max()), float(apart.max())
        sizes.append(top)
        if top >= _LARGE:
            sizes.append(float(torch.where(size < top * (1 - _ALIKE), size, 0).max()))
        noise = _NOISE * min(top, 1.0)
        if largest > noise:
            difference = max(difference, largest)
            differing = max(differing, float(torch.where(apart > noise, size, 0).max()))
    top = max(sizes)
    if top < _LARGE:
        return difference / (top or 1.0)
    bound = _filled_from(sizes)
    if bound == math.inf:
        return difference / (top if top < _FAR * max(differing, difference) else differing or 1.0)
    size = expected.abs()
    near = size < bound
    far = torch.isfinite(size) & ~near
    filled = (found[far] - expected[far]).abs()
    return max(float(filled.max()) / top if filled.numel() else 0.0, _apart(found[near], expected[near]))


def _filled_from(sizes: Sequence[float]) -> float:
    """How large an entry is at least that is as large as the largest, where nothing else is of that order; of
    the sizes the largest of either kind will do. Infinite: no entry is a filling.
    """
    top = max(sizes)
    bound = top * (1 - _ALIKE)
    return bound if top >= _LARGE and max(size for size in sizes if size < bound) < top / _FAR else math.inf


def _fillings(values: Tensor) -> Tensor | None:
    """Which of these real numbers are infinite, or fillings beside others that are not zero; ``None``: none
    is, or some are NaN.
    """
    values = values.detach()
    size = (values if values.dtype.itemsize > 2 else values.float()).abs()
    if not size.numel() or not float(size.max()) >= _LARGE:
        return None
    filled = size.isinf()
    while True:
        size = size.masked_fill(filled, 0.0)
        top = float(size.max())
        below = float(torch.where(size < top * (1 - _ALIKE), size, 0).max())
        if not below or _filled_from([top, below]) == math.inf:
            return filled if bool(filled.any()) else None
        filled |= size > below


def unfilled(values: Tensor, expected: Tensor) -> Tensor:
    """The values where what is expected is neither infinite nor a filling, flat if any is."""
    filled = _fillings(expected)
    return values if filled is None else values[~filled]


def _same_oddities(a: Tensor, b: Tensor) -> bool:
    """Whether NaN and infinities stand at the same places."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _square(values: Tensor) -> float:
    """The sum of squares."""
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    return norm * norm


def distance(found: Tensor, expected: Tensor) -> float:
    """``‖a − b‖₂ / ‖b‖₂`` of two tensors of real numbers, without large entries that are the same (see
    :func:`deviation`); infinite where shapes, or the places of NaN and infinities, differ.
    """
    if found.shape != expected.shape:
        return math.inf
    if not found.numel():
        return 0.0
    apart = size = 0.0
    # Logits are large: all of them as float64 would take more time and memory than the model.
    flat = (tensor.detach().reshape(-1).split(_CHUNK) for tensor in (found, expected))
    for a, b in zip(*flat, strict=True):
        a, b = (part if part.dtype == torch.float64 else part.float() for part in (a, b))
        if not (float(b.abs().max()) < _LARGE and bool(torch.isfinite(a).all())):
            finite = torch.isfinite(b)
            if not torch.equal(torch.isfinite(a), finite):
                return math.inf
            counts = finite & ((b.abs() < _LARGE) | (a != b))
            a, b = (part.masked_fill(~counts, 0.0) for part in (a, b))
        apart += _square(a - b)
        size += _square(b)
    return math.sqrt(apart) / (math.sqrt(size) or 1.0)


__all__ = ["TOLERANCE", "deviation", "distance", "tolerance", "unfilled"]
