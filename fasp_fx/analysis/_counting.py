"""Counts that are sums of products of sizes, each of which shrinks as groups lose channel sets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """The size of one dimension of a tensor, as a function of what groups lose.

    Attributes:
        whole: of the dense model.
        cuts: for each independent axis of channels along the dimension, the groups that shrink it by their
            places, with the positions that go for each channel set that the group loses in all its blocks
            together.
    """

    whole: int
    cuts: tuple[tuple[tuple[int, float], ...], ...] = ()

    def left(self, lost: Sequence[int]) -> float:
        """What is left of it."""
        left: float = self.whole
        for cut in self.cuts:
            gone = sum(per_set * lost[group] for group, per_set in cut)
            left = self.whole - gone if left == self.whole else left * (self.whole - gone) / self.whole
        return left


@dataclass(frozen=True)
class Widest:
    """The largest of several sizes, to which the others are padded."""

    sizes: tuple[Size, ...]

    def left(self, lost: Sequence[int]) -> float:
        """What is left of it."""
        return max(size.left(lost) for size in self.sizes)


class Products:
    """A sum of products of sizes; those that many products share are worked out once."""

    def __init__(self) -> None:
        self._places: dict[Size | Widest, int] = {}
        self._terms: list[tuple[int, tuple[int, ...]]] = []

    def add(self, sizes: Iterable[Size | Widest], factor: int = 1) -> None:
        """Add a product of sizes, so many times."""
        self._terms.append(
            (factor, tuple(self._places.setdefault(size, len(self._places)) for size in sizes))
        )

    def total(self, lost: Sequence[int]) -> float:
        """The sum, when group ``i`` loses ``lost[i]`` channel sets in all its blocks together."""
        return self._sum([size.left(lost) for size in self._places])

    def count(self, lost: Sequence[int]) -> int:
        """The sum in whole numbers, for losses that are alike in all blocks of a group: sizes are whole then,
        but for what rounding took from shares.
        """
        return int(self._sum([round(size.left(lost)) for size in self._places]))

    def expected(self, lost: Sequence[Tensor]) -> Tensor:
        """As :meth:`total`, of numbers with a gradient."""
        return torch.as_tensor(self.total(lost))  # type: ignore[arg-type]  # arithmetic alone, which tensors know as well

    def _sum(self, left: Sequence[float]) -> float:
        found: float = 0
        for factor, places in self._terms:
            found += factor * math.prod([left[place] for place in places])
        return found


__all__ = ["Products", "Size", "Widest"]
