"""Whether two programs compute the same: in their own precision, and in a higher one where that leaves a
doubt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ...base._deviation import deviation
from ...base._tolerable import tolerable
from ...capturing._compare_with_model import coarsest
from ...capturing._program import Program
from ._execution import Ran, remembers, run
from ._inputs import Inputs

#: max|a − b| / max|b| from which on a higher precision decides, as a multiple of the precision: 2e-5 in
#: float32, where sums of thousands of addends in another order stay below; and 1e-4 where that would take
#: long
_DOUBT, _DOUBT_LONG = 160.0, 840.0
#: the same for types of 16 bits and fewer, which round every result
_DOUBT_HALF = 4.0
#: what double precision lets pass
_EQUAL = 1e-6


@dataclass(frozen=True)
class Seen:
    """What one comparison came to.

    Attributes:
        deviation: max|a − b| / max|b| of the worst output, infinite where integers, shapes or the places of
            NaN and infinities differ.
        equal: whether the two compute the same but for rounding.
        compared: whether they could be compared.
        call: which of the calls in a row differs most, from 0.
        rounded: whether an operator that has no higher precision rounded on the way to it.
        alone: whether a doubt is left that no higher precision could settle, since nothing runs in one.
    """

    deviation: float
    equal: bool
    compared: bool = True
    call: int = 0
    rounded: bool = False
    alone: bool = False


class ReferenceFailedError(Exception):
    """The masked dense program does not run on these inputs."""


def compare(reference: Program, module: fx.GraphModule, pruned: Program, inputs: Inputs) -> Seen:
    """Run the masked dense program and the pruned one on the same inputs.

    Args:
        module: the graph to run of the pruned program, whose example is that of ``pruned``.

    Raises:
        ReferenceFailedError: the dense program does not run on these inputs.
        Exception: what the pruned program raises.
    """
    return settled(
        lambda dtype: _compare(reference, module, pruned, inputs, dtype),
        torch.finfo(coarsest(reference)).eps,
        inputs.long,
    )


def takes(program: Program, inputs: Inputs) -> bool:
    """Whether a program runs on some inputs."""
    try:
        run(program.module, inputs.of(program), 1, None)
    except tolerable(Exception):  # a program raises what it likes
        return False
    return True


def settled(look: Callable[[torch.dtype | None], Seen], precision: float, long: bool = False) -> Seen:
    """Compare two computations in their own precision, and in a higher one where that leaves a doubt. Where
    none can be had, what passes is the little that would have left none.

    Args:
        look: compares them in a precision, ``None`` being their own.
        precision: that of the coarsest type in them.
        long: a shorter comparison follows, in which small deviations can be looked into.
    """
    single = torch.finfo(torch.float32).eps
    half, factor = precision > single, _DOUBT_LONG if long else _DOUBT
    own = (_DOUBT_HALF if half else factor) * precision
    last = own if half else _DOUBT_LONG * single
    rounded = precision if half else own  # by an operator on the way: the same values on both sides
    seen = look(None)
    seen = replace(seen, equal=seen.deviation <= own)
    if not seen.compared or (seen.equal and (long or not half)):
        return seen
    for dtype, allowed in [*([(torch.float32, factor * single)] if half else []), (torch.float64, _EQUAL)]:
        try:
            found = look(dtype)
        except tolerable(Exception):  # there is no such precision here, or not for what is computed
            return replace(seen, equal=seen.deviation <= last, alone=True)
        last = _DOUBT_LONG * single
        if found.rounded and dtype is torch.float64:
            allowed = rounded
        seen = replace(found, equal=found.deviation <= allowed)
        if seen.equal:
            break
    return seen


def _compare(
    reference: Program, module: fx.GraphModule, pruned: Program, inputs: Inputs, precision: torch.dtype | None
) -> Seen:
    calls = 2 if remembers(reference.module) or remembers(module) else 1
    try:
        expected = run(reference.module, inputs.of(reference), calls, precision)
    except tolerable(Exception) as error:  # a program raises what it likes
        raise ReferenceFailedError(str(error)) from error
    found = run(module, inputs.of(pruned), calls, precision)
    if found.drawn != expected.drawn:
        return Seen(0.0, True, compared=False)
    worst, at = 0.0, 0
    for call, found_deviation in deviations(found, expected, reference.state_outputs):
        if found_deviation > worst:
            worst, at = found_deviation, call
    return Seen(worst, True, call=at, rounded=expected.rounded or found.rounded)


def deviations(found: Ran, expected: Ran, state: frozenset[int] = frozenset()) -> Iterable[tuple[int, float]]:
    """The deviation of every output, with the call that it is of; outputs that hold state may be narrower,
    and are not compared then.
    """
    for call, (ours, theirs) in enumerate(zip(found.outputs, expected.outputs, strict=True)):
        if len(ours) != len(theirs):
            yield call, math.inf
            return
        for index, (a, b) in enumerate(zip(ours, theirs)):
            if index in state and isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape:
                continue
            yield call, deviation(a, b)


__all__ = [
    "ReferenceFailedError",
    "Seen",
    "compare",
    "deviations",
    "settled",
    "takes",
]
