"""A source of small choices, from which calls of operators are made up."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

#: what the numbers in tensors can be; an operator is given the kinds it takes
KINDS = ("real", "unit", "above", "whole", "bool", "complex")


class Draw:
    """Random small sizes, flags and tensors.

    Args:
        seed: equal seeds draw equal calls.
        most: no size is larger than this.
        kind: what tensors hold where nothing else is asked for, one of :data:`KINDS`.
    """

    def __init__(self, seed: int, most: int = 4, kind: str = "real") -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.most, self.kind = most, kind

    def integer(self, low: int, high: int) -> int:
        """An integer between both, inclusive."""
        return self.random.randint(low, high)

    def flag(self, likely: float = 0.5) -> bool:
        """Whether something happens."""
        return self.random.random() < likely

    def choice(self, items: Sequence[T]) -> T:
        """One of these."""
        return self.random.choice(items)

    def some(self, items: Sequence[T], least: int = 0) -> list[T]:
        """Some of these, in their order."""
        count = self.integer(min(least, len(items)), len(items))
        chosen = set(self.random.sample(range(len(items)), count))
        return [item for index, item in enumerate(items) if index in chosen]

    def order(self, items: Sequence[T]) -> list[T]:
        """All of these in another order."""
        return self.random.sample(list(items), len(items))

    def size(self, least: int = 2) -> int:
        """The size of a dimension, rarely 1."""
        return 1 if least <= 1 or self.flag(0.08) else self.integer(min(least, self.most), self.most)

    def shape(self, least: int = 1, most: int = 4) -> list[int]:
        """The sizes of a tensor of some rank."""
        return [self.size() for _ in range(self.integer(least, max(least, min(most, self.most))))]

    def dim(self, rank: int) -> int:
        """A dimension, counted from either end."""
        return self.integer(-rank, rank - 1) if rank else 0

    def float(self) -> float:
        """A number away from 0 and 1."""
        return round(self.random.uniform(0.15, 0.85), 3)

    def tensor(self, shape: Sequence[int], kind: str | None = None, below: int = 2) -> Tensor:
        """A tensor of these sizes; ``below`` bounds the numbers of kind ``index``."""
        kind = kind or self.kind
        sizes = list(shape)
        if kind == "index":
            return torch.randint(0, max(below, 1), sizes, generator=self.generator)
        if kind == "whole":
            return torch.randint(1, 7, sizes, generator=self.generator)
        if kind == "bool":
            return torch.randint(0, 2, sizes, generator=self.generator).bool()
        if kind == "complex":
            return torch.randn(sizes, generator=self.generator, dtype=torch.complex128)
        if kind == "unit":
            return torch.rand(sizes, generator=self.generator, dtype=torch.float64) * 0.8 + 0.1
        if kind == "above":
            return torch.rand(sizes, generator=self.generator, dtype=torch.float64) * 2 + 1.1
        return torch.randn(sizes, generator=self.generator, dtype=torch.float64)

    def like(self, tensor: Tensor, low: Any = None) -> Tensor:
        """Other numbers of the same kind as those of a tensor."""
        if tensor.dtype == torch.bool:
            return ~tensor
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor  # indices name positions; they are not perturbed
        noise = torch.rand(tensor.shape, generator=self.generator, dtype=torch.float64)
        return (
            (tensor * (0.5 + noise.to(tensor.dtype)))
            if tensor.is_complex()
            else (tensor * (0.6 + 0.8 * noise)).to(tensor.dtype)
        )
