"""How far apart two values are, where one is what the other should be but for rounding, and how far apart
they may be for what purpose; and which of many parts are at fault where they are too far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._tensors import dense
from .compat import pytree

T = TypeVar("T")

#: how far apart values may be, by purpose, in float64, float32, float16, and bfloat16 or less
TOLERANCE: dict[str, tuple[float, float, float, float]] = {
    # max|a − b| / max|b| that sums of thousands of addends in another order stay below; types of 16 bits
    # round every result
    "sums in another order": (1e-6, 2e-5, 4e-3, 3.2e-2),
    # the same where nothing runs in a higher precision
    "no higher precision": (1e-6, 1e-4, 4e-3, 3.2e-2),
    # of weights that are computed in every call, and were computed once
    "computed weights": (1e-11, 8e-6, 6.3e-2, 0.5),
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
    finer = (torch.float64, torch.float32, torch.float16)
    return TOLERANCE[purpose][sum(torch.finfo(dtype).eps > torch.finfo(kind).eps for kind in finer)]


#: entries from here on may be fillings
_LARGE, _LARGE_POWER = 1e4, 13
#: by so many powers of two they are larger than all others
_FAR_POWER = 12
#: elements compared at once: few enough to stay in the cache of a core
_CHUNK = 1 << 18


def built_alike(value: Any, expected: Any, same: Callable[[Any, Any], bool]) -> bool:
    """Whether two containers, or what else is registered as such, are built alike of parts that are the
    same.
    """
    leaves, structure = pytree.tree_flatten(value)
    others, other = pytree.tree_flatten(expected)
    return bool(structure == other) and all(map(same, leaves, others))


def deviation(actual: Any, expected: Any) -> float:
    """``max|a − b| / max|b|`` of two outputs, of fillings by themselves; infinite where they cannot be
    compared, or are integers that differ.
    """
    if not (isinstance(actual, Tensor) and isinstance(expected, Tensor)):
        return 0.0 if type(actual) is type(expected) and actual == expected else math.inf
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return math.inf
    actual, expected = dense(actual), dense(expected)
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(actual, expected) else math.inf
    return _apart(actual.reshape(-1), expected.reshape(-1))


def _apart(actual: Tensor, expected: Tensor) -> float:
    """The deviation of flat tensors of real or complex numbers.

    Fillings (masked scores of -1e9, say) take no part in what the others are computed of, and would hide
    whatever is wrong with those.
    """
    difference = top = 0.0
    for a, b in zip(actual.split(_CHUNK), expected.split(_CHUNK)):
        odd = ~torch.isfinite(b)
        if bool(odd.any()):
            if not _same_oddities(a[odd], b[odd]):
                return math.inf
            a, b = a[~odd], b[~odd]
        if not bool(torch.isfinite(a).all()):
            return math.inf
        if b.numel():
            a, b = (value if value.dtype.itemsize > 2 else value.float() for value in (a, b))
            difference = max(difference, float((a - b).abs().max()))
            top = max(top, float(b.abs().max()))
    filled = _fillings(expected) if top >= _LARGE else None
    if filled is None:
        return difference / (top or 1.0)
    a, b = actual[filled], expected[filled]
    wrong = ((a - b).abs() / b.abs())[b.isfinite()]
    apart = float(wrong.max()) if wrong.numel() else 0.0
    return max(apart, _apart(actual[~filled], expected[~filled]))


def _fillings(values: Tensor) -> Tensor | None:
    """Which of these numbers are infinite, or fillings: large, and thousands of times as large as all others
    but fillings. ``None``: none is, or some are NaN.
    """
    values = values.detach()
    size = (values if values.dtype.itemsize > 2 else values.float()).abs()
    if not size.numel() or not float(size.max()) >= _LARGE:
        return None
    filled = size.isinf()
    powers = torch.frexp(size.masked_fill(filled, 0.0)).exponent  # of two
    present = powers[(size > 0) & ~filled].unique().tolist()
    gaps = (high for low, high in pairwise(present) if high > _LARGE_POWER and high - low > _FAR_POWER)
    filled |= powers >= next(gaps, math.inf)
    return filled if bool(filled.any()) else None


def unfilled(values: Tensor, expected: Tensor) -> Tensor:
    """The values where what is expected is neither infinite nor a filling, flat if any is."""
    filled = _fillings(expected)
    return values if filled is None else values[~filled]


def _same_oddities(a: Tensor, b: Tensor) -> bool:
    """Whether NaN and infinities stand at the same places."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def lengths_apart(actual: Tensor, expected: Tensor, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """``‖a − b‖₂`` and ``‖b‖₂`` of two tensors of real numbers of one shape, without large entries that are
    the same (see :func:`deviation`); the first is infinite where the places of NaN and infinities differ.

    Args:
        dim: of each vector along it, instead of the tensors'.
    """
    a, b = (part.detach() for part in (actual, expected))
    a, b = (part if part.dtype == torch.float64 else part.float() for part in (a, b))
    finite = torch.isfinite(b)
    counts = finite & ((b.abs() < _LARGE) | (a != b))
    odd = torch.isfinite(a) != finite
    a, b = (part.masked_fill(~counts, 0.0) for part in (a, b))
    difference = (a - b).masked_fill(odd, math.inf)
    apart, size = (torch.linalg.vector_norm(part, dim=dim, dtype=torch.float64) for part in (difference, b))
    return apart, size


def distance(actual: Tensor, expected: Tensor, dim: int | None = None) -> float:
    """``‖a − b‖₂ / ‖b‖₂``, as :func:`lengths_apart` has them; infinite where shapes differ.

    Args:
        dim: the largest of all vectors along it, instead of the tensors'.
    """
    if actual.shape != expected.shape:
        return math.inf
    apart, size = lengths_apart(actual, expected, dim)
    return float((apart / size.masked_fill(size == 0, 1.0)).max()) if apart.numel() else 0.0


# --- The faulty among many, by trying some of them together.


def largest_passing_subset(
    items: Sequence[T], fault: Callable[[list[T]], str | None]
) -> tuple[list[T], list[tuple[T, str]]]:
    """A part of ``items`` without fault that no other item can join, and what was seen when each of the
    others tried to.

    One faulty item among n costs about 2 log n trials.

    Args:
        fault: what is wrong with some of the items together, or ``None``.
    """
    faulty: list[tuple[T, str]] = []

    def join(base: list[T], candidates: Sequence[T]) -> list[T]:
        problem = fault([*base, *candidates]) if candidates else None
        if problem is None:
            return [*base, *candidates]
        if len(candidates) == 1:
            faulty.append((candidates[0], problem))
            return base
        middle = len(candidates) // 2
        return join(join(base, candidates[:middle]), candidates[middle:])

    return join([], items), faulty
