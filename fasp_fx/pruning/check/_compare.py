"""Whether two programs compute the same: in their own precision, and in a higher one where that leaves a
doubt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ...base._tolerable import tolerable
from ...base.compare import deviation, tolerance
from ...capturing._compare_with_model import coarsest
from ...capturing._program import Program
from ._inputs import Inputs
from ._run import Ran, remembers, run


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
    return compare_with_escalation(
        lambda dtype: _compare(reference, module, pruned, inputs, dtype), coarsest(reference)
    )


def takes(program: Program, inputs: Inputs) -> bool:
    """Whether a program runs on some inputs."""
    try:
        run(program.module, inputs.of(program), 1, None)
    except tolerable(Exception):  # a program raises what it likes
        return False
    return True


def compare_with_escalation(look: Callable[[torch.dtype | None], Seen], coarse: torch.dtype) -> Seen:
    """Compare two computations in their own precision, and in a higher one where that leaves a doubt, as
    types of 16 bits always do. Where none can be had, what passes is the little that would have left none.

    Args:
        look: compares them in a precision, ``None`` being their own.
        coarse: the coarsest type in them.
    """
    is_half = torch.finfo(coarse).eps > torch.finfo(torch.float32).eps
    seen = look(None)
    seen = replace(seen, equal=seen.deviation <= tolerance("sums in another order", coarse))
    if not seen.compared or (seen.equal and not is_half):
        return seen
    last = coarse
    for dtype in (torch.float32, torch.float64) if is_half else (torch.float64,):
        try:
            found = look(dtype)
        except tolerable(Exception):  # there is no such precision here, or not for what is computed
            return replace(seen, equal=seen.deviation <= tolerance("no higher precision", last), alone=True)
        last, allowed = dtype, tolerance("sums in another order", dtype)
        if found.rounded and dtype is torch.float64:
            allowed = tolerance("one rounded operator", coarse)
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
    worst, call = max(_deviations(found, expected, reference.state_outputs), default=(0.0, 0))
    return Seen(worst, True, call=-call, rounded=expected.rounded or found.rounded)


def _deviations(found: Ran, expected: Ran, state: frozenset[int]) -> Iterable[tuple[float, int]]:
    """The deviation of every output, and the call that it is of, from 0 down; outputs that hold state may be
    narrower, and are not compared then.
    """
    for call, (ours, theirs) in enumerate(zip(found.outputs, expected.outputs, strict=True)):
        if len(ours) != len(theirs):
            yield math.inf, -call
            return
        for index, (a, b) in enumerate(zip(ours, theirs)):
            narrower = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape
            if not (index in state and narrower):
                yield deviation(a, b), -call


__all__ = ["ReferenceFailedError", "Seen", "compare", "compare_with_escalation", "takes"]
