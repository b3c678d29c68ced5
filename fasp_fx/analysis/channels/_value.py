"""Channel numbers beside a tensor: what the abstract interpretation carries from node to node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

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
