"""Consecutive numbers for every channel of every weight and graph input, and what is known of a tensor: which
numbers lie along its dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Slot:
    """One dimension of one weight, graph input or created tensor; its channels are numbered ``base … base +
    size - 1``.

    Where a weight is used block by block (experts, the groups of a convolution) each block has channels of
    its own: ``block_dim`` is divided evenly into ``blocks``, and ``size`` counts the channels of all of them.
    """

    name: str
    dim: int
    base: int
    size: int
    kind: str  # "weight", "input", or "created" for a tensor of equal elements that a node makes
    block_dim: int | None = None
    blocks: int = 1

    def __str__(self) -> str:
        return f"{self.name}[{self.dim}]"

    def numbers(self) -> Tensor:
        """The numbers of its channels, shape ``[size]``, or ``[blocks, size / blocks]``."""
        flat = torch.arange(self.base, self.base + self.size)
        return flat if self.block_dim is None else flat.reshape(self.blocks, -1)


class Numbering:
    """Hands out numbers and finds the slot that a number belongs to."""

    def __init__(
        self,
        blocked: Mapping[tuple[str, int], tuple[int, int]] | None = None,
        stretched: Iterable[tuple[str, int]] = (),
    ) -> None:
        """``blocked`` says for a weight and a dimension which dimension divides it into blocks, and into how
        many.
        """
        self.blocked = dict(blocked or {})
        #: dimensions of expanded tensors, by node, that have channels of their own
        self.stretched = frozenset(stretched)
        #: for every number the one that speaks for it, where numbers were coupled beforehand
        self.representative: Tensor | None = None
        self.slots: list[Slot] = []
        self.total = 0
        self._index: dict[tuple[str, int], Slot] = {}

    def add(self, name: str, dim: int, size: int, kind: str) -> Slot:
        """A new slot with fresh numbers."""
        block_dim, blocks = self.blocked.get((name, dim), (None, 1))
        slot = Slot(name, dim, self.total, size * blocks, kind, block_dim, blocks)
        self.slots.append(slot)
        self._index[(name, dim)] = slot
        self.total += slot.size
        return slot

    def get(self, name: str, dim: int) -> Slot | None:
        """The slot of this dimension of this tensor, if it has one."""
        return self._index.get((name, dim))

    def numbers(self, name: str, dim: int) -> Tensor | None:
        """The numbers along one dimension (see :meth:`Slot.numbers`), or ``None`` for a dimension without
        channels.
        """
        return None if (slot := self.get(name, dim)) is None else slot.numbers()

    def speaking(self, numbers: Tensor) -> Tensor:
        """The numbers that speak for these."""
        if self.representative is None:
            return numbers
        if len(self.representative) < self.total:  # numbers handed out later speak for themselves
            later = torch.arange(len(self.representative), self.total)
            self.representative = torch.cat([self.representative, later])
        return self.representative[numbers]

    def slot_ids(self, numbers: np.ndarray) -> np.ndarray:
        """The index in ``slots`` of each number."""
        bases = np.array([slot.base for slot in self.slots], dtype=np.int64)
        return np.searchsorted(bases, numbers, side="right") - 1

    def slot_of(self, number: int) -> Slot:
        """The slot that one number belongs to."""
        return self.slots[int(self.slot_ids(np.array([number]))[0])]


def laid_by_block(values: Tensor, dim: int, block_dim: int, shape: tuple[int, ...]) -> Tensor:
    """Values for the channels of each block, laid along a weight: along ``dim``, and as the blocks divide
    ``block_dim``; of size 1 along all else.

    Args:
        values: shape ``[blocks, channels of a block]``.
        shape: that of the weight.
    """
    laid = values.repeat_interleave(shape[block_dim] // values.shape[0], 0)
    laid = laid if block_dim < dim else laid.T
    return laid.reshape([size if own in (dim, block_dim) else 1 for own, size in enumerate(shape)])


def marked(count: int, *numbers: np.ndarray) -> np.ndarray:
    """Whether each of the numbers below ``count`` is among some: a table in the place of a search."""
    table = np.zeros(count, dtype=bool)
    for some in numbers:
        table[some] = True
    return table


def recorded_shape(node: fx.Node | None) -> Sequence[int | torch.SymInt]:
    """The shape that was captured of what a node gives; empty where that is no tensor."""
    value = None if node is None else node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else ()


# --- The numbers along the dimensions of a tensor.

#: the number of a position that is not a channel
NONE = -1


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
        first = numbers.narrow(dim, 0, min(numbers.shape[dim], 1))
        if numbers.stride(dim) == 0 or torch.equal(numbers, first.expand(numbers.shape)):
            numbers = first
    return numbers.contiguous()


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
        """The axis of these numbers, or ``None`` if they do not vary.

        The dimension that can shrink is the one along which they vary fastest: channels of a weight are
        numbered consecutively, so that where the step is smallest neighbours in the weight lie.
        """
        numbers = collapse(numbers)
        varying = [dim for dim, size in enumerate(numbers.shape) if size > 1]
        steps = {dim: smallest_step(numbers.numpy(), dim) for dim in varying if len(varying) > 1}
        dim = min(varying, key=lambda dim: (steps.get(dim, 0), -dim), default=None)
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
    where that is known (indices that are constants); ``names`` are the channels at the positions that its
    integers, chosen at run time, number; ``vanishes`` says that it is zero at positions that a router never
    chooses; ``created`` that it is constant without any weight (an initial state of zeros, say).
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
