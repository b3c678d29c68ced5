"""Every result is run beside the dense program with its removed columns masked before it is returned.

The check takes one thing from the analysis, which columns of which uses were removed, and none of what makes
the analysis believe that they can be. Whatever a rule, a layout or a pass gets wrong shows in the numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor, fx

from fasp_fx.analysis import APPROXIMATE, Analysis, Group
from fasp_fx.base import largest_passing_subset, pytree, tolerable, warn
from fasp_fx.calibration import Decision, decided, restricted
from fasp_fx.capturing import Program, draws, is_dynamic
from fasp_fx.errors import CallError, VerificationError, VerificationWarning, first_line
from fasp_fx.passes import finish, remove

from ._compare import Inputs, ReferenceFailedError, compare, inputs_for
from ._reference import masked_program

#: inputs of how many sizes are compared, the example among them; where nothing but batches vary, each sample
#: of which is a run by itself
_SIZES, _BATCHES = 3, 2


@dataclass(frozen=True)
class Checked:
    """What was carried out.

    Attributes:
        decision: what really went.
        module: the program without it.
        whole: the groups that were decided and stay whole, by name, with what was seen when they went.
        notes: for the report.
    """

    decision: Decision
    module: fx.GraphModule
    whole: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Fault:
    """What is wrong with a decision, in words, and whether its outputs can be compared, and differ."""

    text: str
    differs: bool = False


class Checker:
    """Takes out of a program what was decided for its analysis, as far as what is left computes what the
    masked dense program does.
    """

    def __init__(self, program: Program, analysis: Analysis, decision: Decision) -> None:
        self.program, self.analysis, self.decision = program, analysis, decision
        self.inputs = tuple(inputs_for(program))
        self.notes: list[str] = []

    def run(self, strict: bool) -> Checked:
        """Check all groups; on failure keep the largest passing subset.

        Args:
            strict: leave nothing out: what does not pass is an error.

        Raises:
            VerificationError: nothing of what was decided passes, or not all of it does and ``strict`` is
                given.
        """
        groups = decided(self.analysis, self.decision)
        if not groups:  # the program stays as it was captured, fused producers included
            return Checked(self.decision, finish(self.program))
        module, fault = self._tried(groups)
        whole: dict[str, str] = {}
        if fault is not None:
            first, (groups, whole) = fault, self._passing(groups)
            if not groups or (strict and whole):
                raise VerificationError(
                    f"what was decided cannot be removed: {first.text}; nothing is returned. A rule says what"
                    " its operator does not do, or a pass is wrong"
                )
            module, fault = self._tried(groups)
        if fault is not None:
            names = ", ".join(f"'{group.name}'" for group in groups if group.status == APPROXIMATE)
            if not fault.differs or not names:
                raise VerificationError(
                    f"{fault.text}, and no group alone makes the difference; nothing is returned"
                )
            self.notes.append(f"approximate groups were asked for ({names}): {fault.text}")
        assert module is not None
        messages = [
            f"group '{name}' stays whole, because pruning it is not exact: {difference}"
            for name, difference in whole.items()
        ]
        for message in messages:
            warn(message, VerificationWarning)
        decision = restricted(self.analysis, self.decision, groups)
        return Checked(decision, module, whole, tuple(dict.fromkeys([*self.notes, *messages])))

    def _passing(self, groups: list[Group]) -> tuple[list[Group], dict[str, str]]:
        """The largest part of groups that passes, and what was seen of each of the others.

        Approximate groups, which no masked program equals, come last, all or none; they only have to run.
        """

        def wrong(some: list[Group]) -> str | None:
            fault = self._tried(some)[1]
            return None if fault is None else fault.text

        kept, faulty = largest_passing_subset(
            [group for group in groups if group.status != APPROXIMATE], wrong
        )
        whole = {group.name: text for group, text in faulty}
        approximate = [group for group in groups if group.status == APPROXIMATE]
        if approximate:
            fault = self._tried([*kept, *approximate])[1]
            if fault is None or fault.differs:
                kept += approximate
            else:
                whole |= {group.name: fault.text for group in approximate}
        return kept, whole

    def _tried(self, groups: list[Group]) -> tuple[fx.GraphModule | None, _Fault | None]:
        """The program without what was decided for these groups, and what is wrong with it."""
        decision = restricted(self.analysis, self.decision, groups)
        try:
            rewritten = remove(self.analysis, decision.gone, decision.weights)
        except tolerable(VerificationError) as error:
            return None, _Fault(str(error))
        try:
            module = finish(rewritten)
        except tolerable(Exception) as error:  # an exporter raises what it likes
            return None, _Fault(
                f"what is left of the program cannot be exported: {type(error).__name__}: {first_line(error)}"
            )
        return module, self._difference(
            masked_program(self.analysis, decision, self.program), rewritten, module
        )

    def _difference(self, reference: Program, pruned: Program, module: fx.GraphModule) -> _Fault | None:
        """How a program differs from its reference, on the first inputs that both take.

        Sizes that the dense program does not take are passed over, and those that an exporter has ruled out
        for no good reason, unless it is the example or nothing else is left.
        """
        if _drawn(reference.module.graph) != _drawn(module.graph):
            self.notes.append(
                "the result was not compared with the dense program, because the random numbers that it draws"
                " are fewer"
            )
            return None
        compared, refused = 0, None
        beyond = any(dim != 0 for inputs in self.inputs for _, dim in inputs.sizes)
        for inputs in self.inputs:
            try:
                seen = compare(reference, module, pruned, inputs)
            except ReferenceFailedError as error:
                if inputs is self.inputs[0]:
                    return _Fault(
                        f"{inputs.text} the dense program with the removed channels masked fails:"
                        f" {first_line(error)}"
                    )
            except CallError as error:
                refused = refused or _failed(inputs, first_line(error))
                if inputs is self.inputs[0]:
                    return refused
            except tolerable(Exception) as error:  # a program raises what it likes
                return _failed(inputs, f"{type(error).__name__}: {first_line(error)}")
            else:
                compared += 1
                if not seen.equal:
                    size = (
                        f"by {seen.deviation:.1e} of its largest value"
                        if math.isfinite(seen.deviation)
                        else "in its integers, its shape or where it is not finite"
                    )
                    return _Fault(
                        f"{inputs.text} an output differs from that of the dense program with the removed"
                        f" channels masked, {size}",
                        differs=True,
                    )
                if seen.alone:
                    self.notes.append(
                        "the result was compared with the dense program in its own precision alone, since it"
                        " does not run in a higher one"
                    )
                if compared == (_SIZES if beyond else _BATCHES):
                    return None
        return None if compared > 1 else refused


def _drawn(graph: fx.Graph) -> list[list[int | None]]:
    """The shapes of the random numbers that a graph draws, but for sizes that vary, which no pruning changes
    and each export names anew.
    """
    drawn = [leaf for node in graph.nodes if draws(node) for leaf in pytree.tree_leaves(node.meta.get("val"))]
    return [
        [None if is_dynamic(size) else int(size) for size in leaf.shape]
        for leaf in drawn
        if isinstance(leaf, Tensor)
    ]


def _failed(inputs: Inputs, cause: str) -> _Fault:
    return _Fault(f"{inputs.text} the pruned program fails, where the dense one runs: {cause}")
