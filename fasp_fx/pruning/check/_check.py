"""Carry a decision out, compare the result with the masked dense program, and leave whole what makes a
difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from torch import fx

from ...analysis._analysis import Analysis
from ...analysis.groups import APPROXIMATE, Group
from ...base._tolerable import tolerable
from ...base._warn import warn
from ...calibration._visit import Decision, decided
from ...capturing._program import Program
from ...errors import CallError, VerificationError, VerificationWarning, first_line
from ...passes import Prune
from ...passes._pruned_module import finish
from ..report import said_whole
from ._compare import Inputs, ReferenceFailedError, Seen, compare, inputs_for, takes
from ._reference import masked_program

#: inputs of how many sizes are compared, the example among them
_SIZES = 3


@dataclass(frozen=True)
class Checked:
    """What was carried out.

    Attributes:
        decision: what really went.
        rewritten, module: the program without it, as the passes left it, and exported and wrapped.
        left: the groups that were decided and stay whole, by name, with what was seen when they went.
        notes: for the report.
    """

    decision: Decision
    rewritten: Program
    module: fx.GraphModule
    left: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class UnsoundError(VerificationError):
    """Not all of what was decided passes."""


def carry_out(
    program: Program, analysis: Analysis, decision: Decision, lap: Callable[[str], None], whole: bool = False
) -> Checked:
    """Take out of a program what was decided for its analysis, as far as what is left computes what the
    masked dense program does.

    Args:
        lap: told the name of each stage when it is done.
        whole: leave nothing out: what does not pass is an error.

    Raises:
        VerificationError: nothing of what was decided passes, or not all of it does and ``whole`` is given.
    """
    return Checker(program, analysis, decision, lap).run(whole)


@dataclass(frozen=True)
class _Fault:
    """What is wrong with a decision, in words, and the deviation of the outputs where these can be
    compared.
    """

    text: str
    deviation: float | None = None


_Made = tuple[Program, fx.GraphModule]


class Checker:
    """Checks groups of one decision together, and finds those that have to stay."""

    def __init__(
        self, program: Program, analysis: Analysis, decision: Decision, lap: Callable[[str], None]
    ) -> None:
        self.program, self.analysis, self.decision, self.lap = program, analysis, decision, lap
        self.inputs = tuple(inputs_for(program))
        #: those on which a masked dense program ran
        self.ran: list[Inputs] = []
        self.notes: list[str] = []
        self._last: tuple[list[Group], _Made | None, _Fault | None] = ([], None, None)

    def run(self, strict: bool) -> Checked:
        """Check all groups; on failure keep the largest passing subset, or raise if ``strict``."""
        groups = decided(self.analysis, self.decision)
        if not groups:  # the program stays as it was captured, fused producers included
            self.lap("passes")
            module = finish(self.program)
            self.lap("export")
            return Checked(self.decision, self.program, module)
        self._check_split()
        made, fault = self._tried(groups, self.lap)
        left: dict[str, str] = {}
        if fault is not None:
            first, (groups, left) = fault, self._passing(groups)
            if not groups or (strict and left):
                raise UnsoundError(
                    f"what was decided cannot be removed: {first.text}; nothing is returned. A rule says what"
                    " its operator does not do, or a pass is wrong"
                )
            made, fault = self._tried(groups)
            names = ", ".join(f"'{group.name}'" for group in groups if group.status == APPROXIMATE)
            if fault is not None and (fault.deviation is None or not names):
                raise VerificationError(
                    f"{fault.text}, and no group alone makes the difference; nothing is returned"
                )
            if fault is not None:
                self.notes.append(f"approximate groups were asked for ({names}): {fault.text}")
        assert made is not None
        said = [said_whole(name, seen) for name, seen in left.items()]
        for text in said:
            warn(text, VerificationWarning)
        self.lap("check")
        decision = restricted(self.analysis, self.decision, groups)
        return Checked(decision, *made, left, tuple(dict.fromkeys([*self.notes, *said])))

    def _passing(self, groups: list[Group]) -> tuple[list[Group], dict[str, str]]:
        """The largest part of groups that passes, and what was seen of each of the others, in graph order.

        Approximate groups, which no masked program equals, come last; they only have to run.
        """
        order = {group.name: index for index, group in enumerate(groups)}

        def text(some: list[Group]) -> str | None:
            fault = self._tried(some)[1]
            return None if fault is None else fault.text

        def failure(some: list[Group]) -> str | None:
            fault = self._tried(sorted([*kept, *some], key=lambda group: order[group.name]))[1]
            return None if fault is None or fault.deviation is not None else fault.text

        kept, left = largest_passing_subset([group for group in groups if group.status != APPROXIMATE], text)
        added, more = largest_passing_subset(
            [group for group in groups if group.status == APPROXIMATE], failure
        )
        seen = sorted([*left, *more], key=lambda item: order[item[0].name])
        kept = sorted([*kept, *added], key=lambda group: order[group.name])
        return kept, {group.name: found for group, found in seen}

    def _tried(
        self, groups: list[Group], lap: Callable[[str], None] = lambda stage: None
    ) -> tuple[_Made | None, _Fault | None]:
        """The program without what was decided for these groups, and what is wrong with it."""
        if self._last[0] != groups:
            self._last = (groups, *self._tried_now(groups, lap))
        return self._last[1:]

    def _tried_now(
        self, groups: list[Group], lap: Callable[[str], None]
    ) -> tuple[_Made | None, _Fault | None]:
        decision = restricted(self.analysis, self.decision, groups)
        try:
            rewritten = Prune(decision.gone, decision.weights, self.analysis)(self.analysis.program)
        except tolerable(VerificationError) as error:
            return None, _Fault(str(error))
        lap("passes")
        try:
            made = rewritten, finish(rewritten)
        except tolerable(Exception) as error:  # an exporter raises what it likes
            return None, _Fault(
                f"what is left of the program cannot be exported: {type(error).__name__}: {first_line(error)}"
            )
        lap("export")
        return made, self._difference(masked_program(self.analysis, decision), made)

    def _difference(self, reference: Program, made: _Made) -> _Fault | None:
        """How a program differs from the masked dense one, on the first inputs that both take.

        Sizes that the dense program does not take are passed over, and those that an exporter has ruled out
        for no good reason, unless it is the example or nothing else is left.
        """
        compared, refused = 0, None
        for inputs in self.inputs:
            is_example = inputs is self.inputs[0]
            try:
                fault = self._on(inputs, reference, made)
            except ReferenceFailedError as error:
                if inputs in self.ran or takes(self.program, inputs):
                    return _Fault(
                        f"{inputs.said} the dense program with the removed channels masked fails, where it"
                        f" runs otherwise: {first_line(error)}"
                    )
                if is_example:
                    self.notes.append(
                        "the result was not run beside the dense program, which does not run on the example"
                        f" inputs: {first_line(error)}"
                    )
                continue
            except CallError as error:
                refused = refused or _failed(inputs, first_line(error))
                if is_example:
                    break
                continue
            self.ran.append(inputs)
            compared += 1
            if fault is not None or compared == _SIZES:
                return fault
        return None if compared > 1 else refused

    def _on(self, inputs: Inputs, reference: Program, made: _Made) -> _Fault | None:
        rewritten, module = made
        try:
            seen = compare(reference, module, rewritten, inputs)
        except (ReferenceFailedError, CallError):
            raise
        except tolerable(Exception) as error:  # a program raises what it likes
            return _failed(inputs, f"{type(error).__name__}: {first_line(error)}")
        if not seen.compared:
            self.notes.append(
                "the result was not compared with the dense program, because the random numbers that it draws"
                " are fewer"
            )
        if seen.equal and seen.alone:
            self.notes.append(
                "the result was compared with the dense program in its own precision alone, since it does not"
                " run in a higher one"
            )
        return None if seen.equal else _Fault(f"{inputs.said} {_said(seen)}", seen.deviation)

    def _check_split(self) -> None:
        """Refuse fused weights that were taken apart wrongly: the program in which they are apart serves as
        the reference.

        Raises:
            VerificationError: the two programs differ before anything is removed.
        """
        apart = self.analysis.program
        for inputs in () if apart is self.program else self.inputs[:_SIZES]:
            try:
                seen = compare(self.program, apart.module, apart, inputs)
            except ReferenceFailedError:
                continue
            if not seen.equal:
                raise VerificationError(
                    f"{inputs.said} the program whose fused weights were taken apart differs from the"
                    " captured one before anything is removed; nothing is returned, because a pass is wrong"
                )


def _failed(inputs: Inputs, cause: str) -> _Fault:
    return _Fault(f"{inputs.said} the pruned program fails, where the dense one runs: {cause}")


def _said(seen: Seen) -> str:
    where = "" if seen.call == 0 else ", in the second of two calls"
    size = (
        "in its integers, its shape or where it is not finite"
        if math.isinf(seen.deviation)
        else f"by {seen.deviation:.1e} of its largest value"
    )
    return f"an output differs from that of the dense program with the removed channels masked{where}, {size}"


T = TypeVar("T")


def largest_passing_subset(
    items: Sequence[T], fault: Callable[[list[T]], str | None]
) -> tuple[list[T], list[tuple[T, str]]]:
    """A part of ``items`` without fault that no other item can join, and what was seen when each of the
    others tried to.

    One faulty item among n costs about 2 log n trials.

    Args:
        fault: what is wrong with some of the items together, or ``None``.
    """
    left: list[tuple[T, str]] = []

    def join(base: list[T], candidates: Sequence[T]) -> list[T]:
        found = fault([*base, *candidates]) if candidates else None
        if found is None:
            return [*base, *candidates]
        if len(candidates) == 1:
            left.append((candidates[0], found))
            return base
        middle = len(candidates) // 2
        return join(join(base, candidates[:middle]), candidates[middle:])

    return join([], items), left


def restricted(analysis: Analysis, decision: Decision, kept: Collection[Group]) -> Decision:
    """The decision for the groups ``kept`` alone.

    A weight that was repaired for a group which stays whole now is as it was captured.
    """
    names = {group.name for group in kept}
    dropped = [group for group in decided(analysis, decision) if group.name not in names]
    if not dropped:
        return decision
    stay = np.concatenate([group.sets for group in dropped])
    unrepaired = {use.weight for group in dropped for use in group.uses}
    unrepaired |= {
        name
        for group in dropped
        if group.name in decision.products
        for name in decision.products[group.name].weights
    }
    for mended in decision.products.values():  # what is put together of several goes back together
        unrepaired |= mended.weights.keys() if unrepaired & mended.weights.keys() else set()
    unrepaired |= {bias for name, bias in decision.biases.items() if name in unrepaired}
    return Decision(
        decision.gone & ~np.isin(analysis.labels, stay),
        {name: value for name, value in decision.weights.items() if name not in unrepaired},
        {name: bias for name, bias in decision.biases.items() if name not in unrepaired},
        {name: outcome for name, outcome in decision.outcomes.items() if name not in unrepaired},
        {
            name: mended
            for name, mended in decision.products.items()
            if name in names and not unrepaired & mended.weights.keys()
        },
        notes=decision.notes,
    )


__all__ = ["Checked", "Checker", "UnsoundError", "carry_out", "largest_passing_subset", "restricted"]
