"""Dimensions that are products of two letters: an operand is divided before a rule is applied, a result put
together after.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fasp_fx.patterns import Dims

from ._value import Axis, DoesNotApplyError, Value, collapse, smallest_step

#: a dimension's letter, or the two letters of its factors
Spelled = tuple[str | tuple[str, str], ...]


def divide(
    value: Value, letters: Spelled, sizes: dict[str, int]
) -> tuple[Value, tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Give every letter a dimension of its own.

    Args:
        sizes: the size of at least one factor of each pair.

    Returns:
        The value, its letters, and the splits made, each (dimension, size of the first factor), to be applied
        in order.
    """
    flat: list[str] = []
    splits: list[tuple[int, int]] = []
    for letter in letters:
        if isinstance(letter, str):
            flat.append(letter)
            continue
        dim, whole = len(flat), value.shape[len(flat)]
        first, second = letter
        known = sizes[first] if first in sizes else sizes[second]
        if not known or whole % known:
            raise DoesNotApplyError(f"a dimension of {whole} is not a multiple of {known}")
        leading = known if first in sizes else whole // known
        value = _split(value, dim, leading)
        splits.append((dim, leading))
        flat += [first, second]
    return value, tuple(flat), tuple(splits)


def _split(value: Value, dim: int, leading: int) -> Value:
    shape = (*value.shape[:dim], leading, value.shape[dim] // leading, *value.shape[dim + 1 :])
    axes = []
    for axis in value.axes:
        single = axis.numbers.shape[dim] == 1
        numbers = collapse(axis.numbers.unflatten(dim, (1, 1) if single else (leading, -1)))
        at = axis.dim + (axis.dim > dim)
        if axis.dim == dim:
            varying = [d for d in (dim, dim + 1) if numbers.shape[d] > 1]
            at = min(varying or [dim], key=lambda d: (smallest_step(numbers.numpy(), d), -d))
        axes.append(Axis(numbers, at, axis.slot))
    return Value(shape, tuple(axes), value.constant, value.origin, created=value.created)


def join(numbers: Tensor, letters: Spelled, sizes: dict[str, int]) -> Tensor:
    """Numbers with one dimension per letter, put together to one dimension per pair."""
    for dim, letter in enumerate(letters):
        if not isinstance(letter, str):
            if numbers.shape[dim] > 1 or numbers.shape[dim + 1] > 1:
                full = list(numbers.shape)
                full[dim : dim + 2] = [sizes[letter[0]], sizes[letter[1]]]
                numbers = numbers.expand(full)
            numbers = numbers.flatten(dim, dim + 1)
    return numbers


def singles(letters: Spelled) -> tuple[str, ...]:
    """All letters in order."""
    return tuple(
        single for letter in letters for single in ((letter,) if isinstance(letter, str) else letter)
    )


def spell(dims: Dims, rank: int, runs: dict[str, int]) -> Spelled:
    """One letter (or pair) per dimension: runs and the ellipsis written out, the ellipsis numbered from the
    right.
    """
    letters: list[str | tuple[str, str]] = []
    fixed = fixed_rank(dims, runs)
    for token in dims:
        if token == "...":
            letters += [f".{index}" for index in reversed(range(rank - fixed))]
        elif isinstance(token, str) and token in runs:
            letters += [f"{token}{index}" for index in range(runs[token])]
        else:
            letters.append(token)
    return tuple(letters[len(letters) - rank :]) if len(letters) > rank else tuple(letters)


def fixed_rank(dims: Sequence[str | tuple[str, str]], runs: dict[str, int]) -> int:
    """The number of dimensions without the ellipsis."""
    return sum(runs.get(token, 1) if isinstance(token, str) else 1 for token in dims if token != "...")
