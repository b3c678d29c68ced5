"""Consecutive numbers for every channel of every weight and graph input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """One dimension of one weight or graph input; its channels are numbered ``base … base + size - 1``."""

    name: str
    dim: int
    base: int
    size: int
    kind: str  # "weight" or "input"

    def __str__(self) -> str:
        return f"{self.name}[{self.dim}]"

    def numbers(self) -> Tensor:
        """The numbers of its channels, shape ``[size]``."""
        return torch.arange(self.base, self.base + self.size)


class Numbering:
    """Hands out numbers and finds the slot that a number belongs to."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.total = 0
        self._index: dict[tuple[str, int], Slot] = {}
        self._bases: np.ndarray | None = None

    def add(self, name: str, dim: int, size: int, kind: str) -> Slot:
        """A new slot with fresh numbers."""
        slot = Slot(name, dim, self.total, size, kind)
        self.slots.append(slot)
        self._index[(name, dim)] = slot
        self.total += size
        self._bases = None
        return slot

    def get(self, name: str, dim: int) -> Slot | None:
        """The slot of this dimension of this tensor, if it has one."""
        return self._index.get((name, dim))

    def numbers(self, name: str, dim: int) -> Tensor | None:
        """The numbers along one dimension, shape ``[size]``, or ``None`` for a dimension without channels."""
        slot = self.get(name, dim)
        return None if slot is None else slot.numbers()

    def slot_ids(self, numbers: np.ndarray) -> np.ndarray:
        """The index in ``slots`` of each number."""
        if self._bases is None:
            self._bases = np.array([slot.base for slot in self.slots], dtype=np.int64)
        return np.searchsorted(self._bases, numbers, side="right") - 1

    def slot_of(self, number: int) -> Slot:
        """The slot that one number belongs to."""
        return self.slots[int(self.slot_ids(np.array([number]))[0])]
