"""Consecutive numbers for every channel of every weight and graph input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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
        self._bases: np.ndarray | None = None

    def add(self, name: str, dim: int, size: int, kind: str) -> Slot:
        """A new slot with fresh numbers."""
        block_dim, blocks = self.blocked.get((name, dim), (None, 1))
        slot = Slot(name, dim, self.total, size * blocks, kind, block_dim, blocks)
        self.slots.append(slot)
        self._index[(name, dim)] = slot
        self.total += slot.size
        self._bases = None
        return slot

    def get(self, name: str, dim: int) -> Slot | None:
        """The slot of this dimension of this tensor, if it has one."""
        return self._index.get((name, dim))

    def numbers(self, name: str, dim: int) -> Tensor | None:
        """The numbers along one dimension (see :meth:`Slot.numbers`), or ``None`` for a dimension without
        channels.
        """
        slot = self.get(name, dim)
        return None if slot is None else slot.numbers()

    def speaking(self, numbers: Tensor) -> Tensor:
        """The numbers that speak for these."""
        if self.representative is None:
            return numbers
        if len(self.representative) < self.total:  # numbers handed out later speak for themselves
            self.representative = torch.cat(
                [self.representative, torch.arange(len(self.representative), self.total)]
            )
        return self.representative[numbers]

    def slot_ids(self, numbers: np.ndarray) -> np.ndarray:
        """The index in ``slots`` of each number."""
        if self._bases is None:
            self._bases = np.array([slot.base for slot in self.slots], dtype=np.int64)
        return np.searchsorted(self._bases, numbers, side="right") - 1

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
