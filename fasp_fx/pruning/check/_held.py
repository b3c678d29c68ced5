"""Carry a decision out, hold the result against the masked dense program, and leave whole what
does not hold.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from torch import fx

from ...analysis._analysis import Analysis
from ...analysis.groups import APPROXIMATE, Group
from ...base._tolerable import tolerable
from ...base._warn import warn
from ...calibration.observe._visit import Decision, decided
from ...capturing._program import Program
from ...errors import CallError, VerificationError, VerificationWarning, first_line
from ...passes import Prune, share_again
from ...passes._finish import finish
from ...passes._pruned_module import PrunedModule
from ..report import said_whole
from ._blame import sound_part
from ._compare import ReferenceFailedError, Seen, compare, takes
from ._inputs import Inputs, example_inputs, later_inputs, other_inputs
from ._reference import is_of_the_captured, masked_program
from ._restrict import restricted


@dataclass(frozen=True)
class Held:
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


def carry_out(
    program: Program, analysis: Analysis, decision: Decision, lap: Callable[[str], None], whole: bool = False
) -> Held:
    """Take out of a program what was decided for its analysis, as far as what is left computes what the
    masked dense program does.

    Args:
        lap: told the name of each stage when it is done.
        whole: leave nothing out: what does not hold is an error.

    Raises:
        VerificationError: nothing of what was decided holds, or not all of it does and ``whole`` is given.
    """
    return _Net(program, analysis, decision, lap).cast(whole)


@dataclass(frozen=True)
class _Fault:
    """What is wrong with a decision.

    Attributes:
        text: what was seen.
        exporting: whether it takes an export to see it.
        deviation: of the outputs, where these can be compared.
    """

    text: str
    exporting: bool = False
    deviation: float | None = None


@dataclass
class _Made:
    """A decision carried out."""

    rewritten: Program
    module: fx.GraphModule


class _Net:
    def __init__(
        self, program: Program, analysis: Analysis, decision: Decision, lap: Callable[[str], None]
    ) -> None:
        self.program, self.analysis, self.decision, self.lap = program, analysis, decision, lap
        self.order = {group.name: index for index, group in enumerate(analysis.groups)}
        self.left: dict[str, str] = {}
        self.notes: list[str] = []
        #: what the programs are run on; settled by the first comparison
        self.inputs: list[Inputs] | None = None

    def cast(self, whole: bool) -> Held:
        """Hold everything, and as much as does hold if that does not."""
        groups = decided(self.analysis, self.decision)
        if not groups:  # the program stays as it was captured, fused producers included
            self.lap("passes")
            module = finish(self.program, before=self.program.module.graph)
            self.lap("export")
            return Held(self.decision, self.program, module)
        made, fault = self._tried(groups, exporting=True, lap=self.lap)
        if fault is not None:
            approximate = [group for group in groups if group.status == APPROXIMATE]
            exact, made = self._sound(
                [group for group in groups if group.status != APPROXIMATE], None if approximate else fault
            )
            groups = exact
            if approximate:
                groups, made = self._with_approximate(exact, approximate)
            if not groups or (whole and self.left):
                raise UnsoundError(
                    f"what was decided cannot be removed: {fault.text}; nothing is returned. A rule says what"
                    " its operator does not do, or a pass is wrong",
                    self.left,
                )
        assert made is not None
        assert isinstance(made.module, PrunedModule)
        left = dict(sorted(self.left.items(), key=lambda item: self.order[item[0]]))
        said = [said_whole(name, seen) for name, seen in left.items()]
        for text in said:
            warn(text, VerificationWarning)
        self.lap("check")
        decision = restricted(self.analysis, self.decision, groups)
        return Held(
            decision,
            made.rewritten,
            made.module,
            left,
            tuple(dict.fromkeys([*self.notes, *said])),
        )

    def _sound(self, groups: list[Group], fault: _Fault | None) -> tuple[list[Group], _Made | None]:
        """The groups that hold together on all inputs, and the program without them; ``fault``: what is known
        to be wrong with them.
        """
        made: _Made | None = None
        while groups:
            if fault is None:
                made, fault = self._afresh(groups)
                if fault is None:
                    return groups, made
            kept, left = sound_part(groups, partial(self._text, like=fault))
            if not left and not fault.exporting:  # only the exported program is wrong
                fault = replace(fault, exporting=True)
                kept, left = sound_part(groups, partial(self._text, like=fault))
            if not left:
                raise VerificationError(
                    f"{fault.text}, and no group alone makes the difference; nothing is returned"
                )
            self.left |= {group.name: seen for group, seen in left}
            groups, fault = kept, None
        return [], None

    def _with_approximate(
        self, exact: list[Group], approximate: list[Group]
    ) -> tuple[list[Group], _Made | None]:
        """Add the groups that no masked program equals; they have to run, and how far they are from it is
        noted.
        """
        groups = self._sorted([*exact, *approximate])
        made, fault = self._afresh(groups)
        if fault is not None and fault.deviation is None:
            failed = replace(fault, exporting=True)
            added, left = sound_part(
                approximate, lambda some: self._text(self._sorted([*exact, *some]), failed, differing=False)
            )
            self.left |= {group.name: seen for group, seen in left}
            groups = self._sorted([*exact, *added])
            made, fault = self._afresh(groups) if groups else (None, None)
        if fault is not None and fault.deviation is None:
            raise VerificationError(
                f"{fault.text}, and no group alone makes the difference; nothing is returned"
            )
        if fault is not None:
            names = ", ".join(f"'{group.name}'" for group in groups if group.status == APPROXIMATE)
            self.notes.append(f"approximate groups were asked for ({names}): {fault.text}")
        return groups, made

    def _sorted(self, groups: list[Group]) -> list[Group]:
        return sorted(groups, key=lambda group: self.order[group.name])

    def _afresh(self, groups: list[Group]) -> tuple[_Made | None, _Fault | None]:
        """As :meth:`_tried`, with an export and on all inputs."""
        self.inputs = None
        return self._tried(groups, exporting=True)

    def _text(self, groups: list[Group], like: _Fault, differing: bool = True) -> str | None:
        """What is wrong with some groups, looked for where ``like`` was seen; ``differing``: other outputs
        are wrong, not only a failure.
        """
        fault = self._tried(groups, exporting=like.exporting)[1]
        return None if fault is None or (fault.deviation is not None and not differing) else fault.text

    def _tried(
        self, groups: list[Group], exporting: bool, lap: Callable[[str], None] = lambda stage: None
    ) -> tuple[_Made | None, _Fault | None]:
        """The program without what was decided for these groups, and what is wrong with it."""
        decision = restricted(self.analysis, self.decision, groups)
        try:
            rewritten = share_again(
                Prune(decision.gone, decision.weights, self.analysis)(self.analysis.program)
            )
        except tolerable(VerificationError) as error:
            return None, _Fault(str(error))
        lap("passes")
        made = _Made(rewritten, rewritten.module)
        if exporting:
            try:
                made.module = finish(rewritten, before=self.program.module.graph)
            except tolerable(Exception) as error:  # an exporter raises what it likes
                return None, _Fault(
                    f"what is left of the program cannot be exported: {type(error).__name__}:"
                    f" {first_line(error)}",
                    exporting=True,
                )
            lap("export")
        return made, self._difference(decision, made)

    def _difference(self, decision: Decision, made: _Made) -> _Fault | None:
        """How a program differs from the masked dense one, on the inputs where that shows first."""
        reference = masked_program(self.program, self.analysis, decision)
        if self.inputs is not None:
            try:
                return next(
                    (
                        fault
                        for inputs in self.inputs
                        if (fault := self._on(inputs, reference, made)) is not None
                    ),
                    None,
                )
            except CallError as error:
                return _Fault(first_line(error), exporting=True)
            except ReferenceFailedError as error:
                # With others masked it does: nothing can be said of these, so they are not held.
                return _Fault(
                    f"the dense program with these channels alone masked fails: {first_line(error)}"
                )
        self.inputs, fault = [], None
        for inputs in example_inputs(self.program):
            try:
                fault = self._on(inputs, reference, made)
            except (ReferenceFailedError, CallError) as error:
                failure = error
                continue  # the next one is the whole example
            self.inputs = [inputs]
            break
        if not self.inputs:
            if isinstance(failure, CallError):
                return _Fault(
                    f"the pruned program refuses the example inputs: {first_line(failure)}", exporting=True
                )
            self.notes.append(
                "the result was not run beside the dense program, which does not run on the example inputs:"
                f" {first_line(failure)}"
            )
            return None
        if fault is not None:
            return fault
        for inputs in later_inputs(self.program):
            with contextlib.suppress(ReferenceFailedError, CallError):  # such sizes may be ruled out
                fault = self._on(inputs, reference, made)
                self.inputs = [inputs] if fault is not None else [*self.inputs, inputs]
        if fault is not None:
            self._check_split(self.inputs)
            return fault
        refused: tuple[Inputs, _Fault] | None = None
        for inputs in other_inputs(self.program):
            try:
                fault = self._on(inputs, reference, made)
            except ReferenceFailedError:
                continue  # the dense program does not take these sizes
            except (
                CallError
            ) as error:  # an exporter can rule out some sizes for no good reason: others are tried
                refused = refused or (
                    inputs,
                    _Fault(
                        f"{inputs.said} the pruned program fails, where the dense one runs:"
                        f" {first_line(error)}",
                        exporting=True,
                    ),
                )
                continue
            self.inputs = [inputs] if fault is not None else [*self.inputs, inputs]
            refused = None
            break
        self._check_split(self.inputs)
        if fault is not None or refused is None:
            return fault
        self.inputs = [refused[0]]
        return refused[1]

    def _check_split(self, inputs: list[Inputs]) -> None:
        """Refuse fused weights that were taken apart wrongly, where that would go unseen: the program in
        which they are apart serves as the reference.

        Raises:
            VerificationError: the two programs differ before anything is removed.
        """
        apart = self.analysis.program
        if is_of_the_captured(self.program, self.analysis):
            return
        for one in inputs:
            try:
                seen = compare(self.program, apart.module, apart, one)
            except ReferenceFailedError:
                continue
            if not seen.equal:
                raise VerificationError(
                    f"{one.said} the program whose fused weights were taken apart differs from the captured"
                    " one before anything is removed; nothing is returned, because a pass is wrong"
                )

    def _on(self, inputs: Inputs, reference: Program, made: _Made) -> _Fault | None:
        try:
            seen = compare(reference, made.module, made.rewritten, inputs)
        except ReferenceFailedError as error:
            if takes(self.program, inputs):
                return _Fault(
                    f"{inputs.said} the dense program with the removed channels masked fails, where it runs"
                    f" without masks: {first_line(error)}"
                )
            raise
        except CallError:
            raise
        except tolerable(Exception) as error:  # a program raises what it likes
            return _Fault(
                f"{inputs.said} the pruned program fails, where the dense one runs: {type(error).__name__}:"
                f" {first_line(error)}"
            )
        if not seen.compared:
            self.notes.append(
                "the result was not compared with the dense program, because the random numbers that it draws"
                " are fewer"
            )
        if seen.equal and seen.alone:
            self.notes.append(
                "the result was held against the dense program in its own precision alone, since it does not"
                " run in a higher one"
            )
        return None if seen.equal else _Fault(f"{inputs.said} {_said(seen)}", deviation=seen.deviation)


class UnsoundError(VerificationError):
    """Not all of what was decided holds.

    Attributes:
        left: the groups that cannot be pruned, by name, with what was seen.
    """

    def __init__(self, message: str, left: dict[str, str]) -> None:
        super().__init__(message)
        self.left = left


def _said(seen: Seen) -> str:
    where = "" if seen.call == 0 else ", in the second of two calls"
    size = (
        "in its integers, its shape or where it is not finite"
        if math.isinf(seen.deviation)
        else f"by {seen.deviation:.1e} of its largest value"
    )
    return f"an output differs from that of the dense program with the removed channels masked{where}, {size}"


__all__ = ["Held", "UnsoundError", "carry_out"]
