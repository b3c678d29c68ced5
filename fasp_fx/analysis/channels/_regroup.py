"""Reshapes: which dimensions of a tensor become which of another, at every size and not only at those of the
interpretation.

A reshape keeps the row-major order. Where both shapes divide into the same factors, each factor keeps its
positions whatever the sizes are. Where they do not (``[time, heads * width]`` read as ``[heads, time,
width]``), positions of several dimensions are dealt out anew; if one of these dimensions varies from call to
call, what comes to lie where differs from call to call, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import groupby

import torch
from torch import Tensor

from fasp_fx.capturing import Size, is_dynamic
from fasp_fx.patterns import DoesNotApplyError

from ._numbering import collapse

#: a factor of a dimension: the dimension, and its size
Piece = tuple[int, Size]


@dataclass(frozen=True)
class Segment:
    """Factors of the source that become these factors of the result, both from the outer to the inner;
    ``dealt``: their positions are dealt out anew.
    """

    before: tuple[Piece, ...]
    after: tuple[Piece, ...]
    dealt: bool = False

    @property
    def varies(self) -> bool:
        """Whether positions lie elsewhere at other sizes."""
        return self.dealt and any(size.varying for _, size in (*self.before, *self.after))


def segments(before: Sequence[Size], after: Sequence[Size]) -> list[Segment]:
    """Divide two shapes with equally many elements into factors that correspond to one another, the outermost
    first.
    """
    xs, ys = (
        [(dim, size) for dim, size in enumerate(shape) if size != Size.fixed(1)] for shape in (before, after)
    )
    pieces: list[Segment] = []
    while xs and ys:
        (i, a), (j, b) = xs.pop(), ys.pop()
        if a == b or b.divides(a):
            pieces.append(Segment(((i, b),), ((j, b),)))
            xs += [] if a == b else [(i, a.over(b))]
        elif a.divides(b):
            pieces.append(Segment(((i, a),), ((j, a),)))
            ys.append((j, b.over(a)))
        else:
            pieces.append(_dealt([(i, a)], [(j, b)], xs, ys))
    if xs or ys:
        pieces.append(Segment(tuple(xs), tuple(ys), dealt=True))
    return pieces[::-1]


def _dealt(xs: list[Piece], ys: list[Piece], outer_xs: list[Piece], outer_ys: list[Piece]) -> Segment:
    """The fewest factors from here outwards whose products agree; takes them from the outer ones.

    They agree at every size where what is left outside does, since the shapes have equally many elements:
    ``[24, T]`` read as ``[24, T // 2, 2]``.
    """
    while _product(xs) != _product(ys) and _product(outer_xs) != _product(outer_ys):
        shorter = _product(xs).value <= _product(ys).value
        inner, outer = (xs, outer_xs) if outer_xs and (shorter or not outer_ys) else (ys, outer_ys)
        inner.insert(0, outer.pop())
    return Segment(tuple(xs), tuple(ys), dealt=True)


def _product(pieces: list[Piece]) -> Size:
    return reduce(Size.times, (size for _, size in pieces), Size.fixed(1))


def regroup(
    numbers: Tensor,
    shape: Sequence[int],
    segments: Sequence[Segment],
    alike: Callable[[Tensor, Tensor], None],
) -> Tensor:
    """Reshape channel numbers.

    Args:
        numbers: of the source's rank, of size 1 along dimensions where they do not vary.
        shape: the shape of the result.
        segments: how the shapes correspond (:func:`segments`).
        alike: called with numbers that must go together, because the place of each varies from call to call.

    Returns:
        The numbers in the result's rank, of size 1 where they do not vary.
    """
    pieces = [piece for segment in segments for piece in segment.before]
    laid = collapse(numbers.reshape([size.value if numbers.shape[dim] > 1 else 1 for dim, size in pieces]))
    unsettled = [segment.varies for segment in segments for _ in segment.before]
    for _, run in groupby(enumerate(pieces), key=lambda item: item[1][0]):
        places = list(run)
        # Of a dimension that several have been merged into, nothing is known but its numbers: divided, they
        # must not depend on a size that varies.
        if len(places) > 1 and any(size.varying and laid.shape[at] > 1 for at, (_, size) in places):
            unsettled[places[0][0] : places[-1][0] + 1] = [True] * len(places)
    for at, free in enumerate(unsettled):
        if free and laid.shape[at] > 1:
            alike(laid.narrow(at, 0, 1), laid)
            laid = laid.narrow(at, 0, 1)
    # From the factors of the source to those of the result.
    full, new = list[int](), list[int]()
    for segment in segments:
        sizes = list(laid.shape[len(full) : len(full) + len(segment.before)])
        varies = any(size > 1 for size in sizes)
        full += [size.value for _, size in segment.before] if segment.dealt and varies else sizes
        new += ([size.value if varies else 1 for _, size in segment.after]) if segment.dealt else sizes
    laid = laid.expand(full).reshape(new)
    # From its factors to its dimensions.
    pieces = [piece for segment in segments for piece in segment.after]
    spread = {dim for at, (dim, _) in enumerate(pieces) if laid.shape[at] > 1}
    laid = laid.expand([size.value if dim in spread else 1 for dim, size in pieces])
    return laid.reshape([size if dim in spread else 1 for dim, size in enumerate(shape)])


# --- Channel numbers along a dimension whose size varies: what of them repeats, so that they can be laid out
# at any size.


@dataclass(frozen=True)
class Repeating:
    """Numbers of a tensor that was interpreted at small sizes, as they lie at all sizes.

    Heads that are folded into the batch lie along one dimension with it, as often after one another as there
    are sequences.

    Attributes:
        numbers: with every dimension that repeats as long as it is before it repeats.
        varies: for each dimension, whether its size varies and numbers lie along it.
    """

    numbers: Tensor
    varies: tuple[bool, ...]

    def at(self, shape: Sequence[int]) -> Tensor:
        """The numbers of a tensor of this shape, with size 1 along dimensions where they do not vary.

        Raises:
            ValueError: a dimension is no multiple of what repeats along it.
        """
        return self.numbers.repeat([self._repeats(dim, size) for dim, size in enumerate(shape)])

    def summed(self, values: Tensor) -> Tensor:
        """Values of a tensor added up over all that has the same number, in the shape of ``numbers``.

        Raises:
            ValueError: a dimension is no multiple of what repeats along it.
        """
        for dim, (length, varies) in enumerate(zip(self.numbers.shape, self.varies, strict=True)):
            if length == 1:
                values = values.sum(dim, keepdim=True)
            elif varies:
                values = values.unflatten(dim, (self._repeats(dim, values.shape[dim]), length)).sum(dim)
        return values

    def _repeats(self, dim: int, size: int) -> int:
        length = self.numbers.shape[dim]
        if self.varies[dim] and size % length:
            raise DoesNotApplyError(f"a dimension of size {size} holds {length} positions that repeat")
        return size // length if self.varies[dim] else 1


def repeating(numbers: Tensor, recorded: Sequence[int | torch.SymInt]) -> Repeating | None:
    """How numbers lie at all sizes; ``None`` where they do not repeat along a dimension whose size varies.

    Args:
        numbers: as interpreted, with size 1 along dimensions where they do not vary.
        recorded: the shape of their tensor as it was captured, with symbols for sizes that vary.
    """
    varies = [False] * numbers.dim()
    lengths = enumerate(zip(numbers.shape, recorded))
    for dim, length in ((dim, length) for dim, (length, size) in lengths if length > 1 and is_dynamic(size)):
        for period in (part for part in range(1, length) if length % part == 0):
            times = [length // period if other == dim else 1 for other in range(numbers.dim())]
            if torch.equal(numbers.narrow(dim, 0, period).repeat(times), numbers):
                numbers, varies[dim] = numbers.narrow(dim, 0, period), period > 1
                break
        else:
            return None
    return Repeating(numbers.contiguous(), tuple(varies))
