"""A letter for every dimension of an operand: which alternative of a rule a call takes, and dimensions that
are products of two letters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ...patterns import Alternative, Dims, Rule

# --- Dimensions that are products of two letters: an operand is divided before a rule is applied, a result
# put together after.


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


# --- Operands of a lettered rule: which alternative of the rule a call takes, and a letter for each
# dimension.


@dataclass(frozen=True)
class Operand:
    """An operand with a letter for every dimension; ``splits`` made them so (see :mod:`._factors`)."""

    name: str
    value: Value
    letters: tuple[str, ...]
    node: fx.Node | None
    splits: tuple[tuple[int, int], ...] = ()

    def at(self, letter: str) -> list[Axis]:
        """The axes that shrink this letter."""
        return self.value.at(self.letters.index(letter))

    def size(self, letter: str) -> int:
        """The size of a letter's dimension."""
        return self.value.shape[self.letters.index(letter)]


def choose(rule: Rule, arguments: dict[str, Any]) -> Alternative:
    """The first alternative whose condition holds and whose operands have enough dimensions; else
    the last.
    """
    for alternative in rule.alternatives[:-1]:
        if alternative.condition and not arguments.get(alternative.condition):
            continue
        given = [(operand, arguments.get(operand.name)) for operand in alternative.operands]
        if all(value is None or _fits(operand.dims, len(value.shape)) for operand, value in given):
            return alternative
    return rule.alternatives[-1]


def _fits(dims: Dims, rank: int) -> bool:
    if any(isinstance(token, str) and token.endswith("*") for token in dims):
        return rank >= len(dims) - 1
    return rank == len(dims) or (dims[:1] == ("...",) and rank >= len(dims) - 1)


def run_lengths(alternative: Alternative, rule: Rule, arguments: dict[str, Any]) -> dict[str, int]:
    """The length of every run, from the operands that leave it no choice, or from an argument that holds its
    sizes.
    """
    names = {
        token
        for operand in alternative.operands
        for token in operand.dims
        if isinstance(token, str) and token.endswith("*")
    }
    runs: dict[str, int] = {}
    for clause in rule.all("shape"):
        if len(clause.words) == 2:
            runs[clause.words[1]] = len(arguments[clause.words[0]])
    for _ in names:
        for operand in alternative.operands:
            value = arguments.get(operand.name)
            open_runs = [token for token in operand.dims if token in names and token not in runs]
            if isinstance(value, Value) and len(open_runs) == 1 and "..." not in operand.dims:
                runs[str(open_runs[0])] = len(value.shape) - fixed_rank(
                    operand.dims, {**runs, str(open_runs[0]): 0}
                )
    return {name: runs.get(name, 1) for name in names}


def align(axis: Axis, letters: tuple[str, ...], order: list[str]) -> Tensor:
    """The axis's numbers with one dimension per letter of ``order``."""
    present = [letter for letter in order if letter in letters]
    numbers = axis.numbers.permute([letters.index(letter) for letter in present])
    return numbers.reshape(
        [numbers.shape[present.index(letter)] if letter in present else 1 for letter in order]
    )


#: the number of a position that is not a channel
NONE = -1


class DoesNotApplyError(ValueError):
    """A rule does not serve for this call of its operator; says why."""


#: in a rewritten program, how many channels of its weight stay before each channel
_STAYING: ContextVar[np.ndarray | None] = ContextVar("staying", default=None)


@contextmanager
def counted_by(staying: np.ndarray | None) -> Iterator[None]:
    """Inside the block, steps between channel numbers are counted in channels that stay: what is gone leaves
    gaps, by which no two dimensions compare.
    """
    token = _STAYING.set(staying)
    try:
        yield
    finally:
        _STAYING.reset(token)


def collapse(numbers: Tensor) -> Tensor:
    """Reduce every dimension along which the numbers are constant to size 1."""
    for dim in range(numbers.dim()):
        if numbers.shape[dim] <= 1:
            continue
        first = numbers.narrow(dim, 0, 1)
        neighbours = torch.equal(numbers.narrow(dim, 1, 1), first)  # these tell most apart at once
        if numbers.stride(dim) == 0 or (neighbours and torch.equal(numbers, first.expand(numbers.shape))):
            numbers = first
    return numbers.contiguous()


def innermost(numbers: Tensor) -> int | None:
    """The dimension along which the numbers vary fastest, or ``None`` if they do not vary.

    Channels of a weight are numbered consecutively, so the dimension with the smallest step is the one whose
    positions are neighbours in the weight; that is the dimension that can shrink.
    """
    varying = [dim for dim in range(numbers.dim()) if numbers.shape[dim] > 1]
    if len(varying) <= 1:
        return varying[0] if varying else None
    steps = {dim: smallest_step(numbers.numpy(), dim) for dim in varying}
    return min(varying, key=lambda dim: (steps[dim], -dim))


def smallest_step(numbers: np.ndarray, dim: int) -> int:
    """The smallest difference between neighbours along a dimension, apart from none."""
    moved = np.moveaxis(numbers, dim, 0)
    after, before = moved[1:], moved[:-1]
    apart = (after != before) & (after != NONE) & (before != NONE)
    after, before, staying = after[apart], before[apart], _STAYING.get()
    if staying is not None:  # numbers handed out since are all there
        after, before = (
            np.where(own < len(staying), staying[np.minimum(own, len(staying) - 1)], own)
            for own in (after, before)
        )
    steps = np.abs(after - before)
    return int(steps.min()) if steps.size else np.iinfo(np.int64).max


@dataclass(frozen=True)
class Axis:
    """One independent axis of channels of a tensor.

    ``numbers`` has the tensor's rank, with size 1 along dimensions where it does not vary; ``dim`` is the
    dimension that shrinks when channels go. ``slot`` is the weight and dimension whose channels these are, as
    long as they are merely moved.
    """

    numbers: Tensor
    dim: int
    slot: tuple[str, int] | None = field(default=None, compare=False)

    @staticmethod
    def of(numbers: Tensor, slot: tuple[str, int] | None = None) -> Axis | None:
        """The axis of these numbers, or ``None`` if they do not vary."""
        numbers = collapse(numbers)
        dim = innermost(numbers)
        return None if dim is None else Axis(numbers, dim, slot)

    def varying(self) -> list[int]:
        """The dimensions along which the numbers vary."""
        return [dim for dim, size in enumerate(self.numbers.shape) if size > 1]


@dataclass(frozen=True)
class Value:
    """What is known of one tensor: its shape at the sizes chosen for the interpretation, and its channel
    axes.

    ``constant`` says that it is computed from weights alone; ``origin`` names the weight whose elements it
    holds, merely moved or cast: all of them, or those at one position of a stack. ``data`` is its content
    where that is a known integer tensor (indices); ``names`` the channels at the positions that its integers,
    chosen at run time, number; ``vanishes`` says that it is zero at positions that a router never chooses;
    ``created`` that it is constant without any weight (an initial state of zeros, say).
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...] = ()
    constant: bool = False
    origin: str | None = None
    data: Tensor | None = field(default=None, compare=False)
    names: Tensor | None = field(default=None, compare=False)
    vanishes: bool = field(default=False, compare=False)
    created: bool = field(default=False, compare=False)

    def at(self, dim: int) -> list[Axis]:
        """The axes that shrink ``dim``."""
        return [axis for axis in self.axes if axis.dim == dim]
