"""Channel numbers along a dimension whose size varies: what of them repeats, so that they can be laid out at
any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...capturing._sizes import is_dynamic
from ._value import DoesNotApplyError


@dataclass(frozen=True)
class Repeating:
    """Numbers of a tensor that was interpreted at small sizes, as they lie at all sizes.

    Heads that are folded into the batch lie along one dimension with it, ``abab…`` with the heads inside and
    ``aabb…`` with them outside, as often as there are sequences.

    Attributes:
        numbers: with every dimension that repeats as long as it is before it repeats.
        in_runs: for each dimension, whether each position repeats before the next one comes, and not all of
            them after one another.
        varies: for each dimension, whether its size varies and numbers lie along it.
    """

    numbers: Tensor
    in_runs: tuple[bool, ...]
    varies: tuple[bool, ...]

    def at(self, shape: Sequence[int]) -> Tensor:
        """The numbers of a tensor of this shape, with size 1 along dimensions where they do not vary.

        Raises:
            ValueError: a dimension is no multiple of what repeats along it.
        """
        found = self.numbers
        for dim, (size, runs, varies) in enumerate(zip(shape, self.in_runs, self.varies, strict=True)):
            if varies:
                each = self._repeats(dim, size)
                found = (
                    found.repeat_interleave(each, dim)
                    if runs
                    else found.repeat([each if other == dim else 1 for other in range(found.dim())])
                )
        return found

    def summed(self, values: Tensor) -> Tensor:
        """Values of a tensor added up over all that has the same number, in the shape of ``numbers``.

        Raises:
            ValueError: a dimension is no multiple of what repeats along it.
        """
        found = values
        for dim, size in enumerate(self.numbers.shape):
            found = found.sum(dim, keepdim=True) if size == 1 else found
        for dim, (runs, varies) in enumerate(zip(self.in_runs, self.varies, strict=True)):
            if varies:
                each, own = self._repeats(dim, values.shape[dim]), self.numbers.shape[dim]
                found = (
                    found.unflatten(dim, (own, each)).sum(dim + 1)
                    if runs
                    else found.unflatten(dim, (each, own)).sum(dim)
                )
        return found

    def _repeats(self, dim: int, size: int) -> int:
        own = self.numbers.shape[dim]
        if size % own:
            raise DoesNotApplyError(f"a dimension of size {size} holds {own} positions that repeat")
        return size // own


def repeating(numbers: Tensor, recorded: Sequence[int | torch.SymInt]) -> Repeating | None:
    """How numbers lie at all sizes; ``None`` where they do not repeat along a dimension whose size varies.

    Args:
        numbers: as interpreted, with size 1 along dimensions where they do not vary.
        recorded: the shape of their tensor as it was captured, with symbols for sizes that vary.
    """
    found = numbers
    in_runs, varies = [False] * numbers.dim(), [False] * numbers.dim()
    for dim, size in enumerate(recorded):
        if numbers.shape[dim] == 1 or not is_dynamic(size):
            continue
        varies[dim] = True
        length = numbers.shape[dim]
        parts = [part for part in range(1, length + 1) if length % part == 0]
        period = next(
            part
            for part in parts
            if torch.equal(found.narrow(dim, 0, part).repeat(_times(found, dim, length // part)), found)
        )
        if period < length:
            found = found.narrow(dim, 0, period)
            varies[dim] = period > 1
            continue
        run = next(
            (
                part
                for part in parts[::-1]
                if torch.equal(_first_of_runs(found, dim, part).repeat_interleave(part, dim), found)
            ),
            1,
        )
        if run == 1:
            return None
        in_runs[dim], found = True, _first_of_runs(found, dim, run)
    return Repeating(found.contiguous(), tuple(in_runs), tuple(varies))


def _times(tensor: Tensor, dim: int, count: int) -> list[int]:
    return [count if other == dim else 1 for other in range(tensor.dim())]


def _first_of_runs(tensor: Tensor, dim: int, run: int) -> Tensor:
    return tensor.index_select(dim, torch.arange(0, tensor.shape[dim], run))
