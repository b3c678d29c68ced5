"""Channels that a reshape lays beside all of a grid of constants, along one dimension.

A weight that reads such a dimension would tie each channel to the whole grid, and by that all to one another.
The grid cannot shrink by itself, so it stays, and each channel is a run of positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor, fx

from ._facts import Facts
from ._value import Axis


def without_grids(
    axes: Sequence[Axis],
    sources: Sequence[Axis],
    of_parameters: Callable[[Tensor], bool],
    facts: Facts,
    node: fx.Node,
) -> list[Axis]:
    """The axes of a reshaped tensor without those of constants that lie across one of parameters.

    Args:
        axes, sources: the axes, and what each was before the reshape.
        of_parameters: whether some of these numbers are of channels of parameters.
    """
    pairs = list(zip(axes, sources, strict=True))
    if len(pairs) < 2:
        return list(axes)
    shrinking = [of_parameters(axis.numbers) for axis, _ in pairs]
    others = list(itertools.compress(pairs, shrinking))
    found = []
    for pair, shrinks in zip(pairs, shrinking, strict=True):
        if shrinks or not any(_are_product(pair, other) for other in others):
            found.append(pair[0])
            continue
        facts.say(
            facts.frozen,
            pair[0].numbers,
            f"lies across others along the dimension that {node.target} makes",
            node,
        )
    return found


def _are_product(a: tuple[Axis, Axis], b: tuple[Axis, Axis]) -> bool:
    """Whether two axes, each with what it was before, share a dimension, where neither varied along the other
    before.
    """
    return a[0].dim == b[0].dim and not {*a[1].varying()} & {*b[1].varying()}
