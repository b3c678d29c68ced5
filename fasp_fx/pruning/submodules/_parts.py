"""A model that cannot be captured as a whole, pruned by the submodules that can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from ...allocation.budgets import Cap, Latency
from ...analysis import plan as plans
from ...analysis._analysis import Analysis
from ...analysis.groups import Group
from ...analysis.plan import PruningPlan
from ...analysis.resources import Resource, Sparsity
from ...base._tolerable import tolerable
from ...base._warn import warn
from ...calibration._calibration import calibration_calls, check_inputs
from ...calibration._trial import ModelTrial, ServedTrial
from ...calibration._visit import Decision
from ...capturing._unchanged import rewound
from ...errors import (
    CalibrationError,
    CallError,
    CaptureError,
    PlanError,
    VerificationError,
    VerificationWarning,
    first_line,
)
from .._allocating import counted
from .._result import Result
from .._rewriting import Timings, analyze_for, rewrite
from .._subject import Subject
from ..config import PruningConfig
from ..report import Line, Report, Spent, weight_size
from ._stand_in import copied, dressed, put, whole_fingerprint
from ._submodules import Call, CapturedParts, nothing_left, watching

# --- Plans and reports in the names of the whole model.


def plan_within(path: str, plan: PruningPlan) -> PruningPlan:
    """The plan of a part in the names of the whole model."""
    return _mapped(plan, lambda name: f"{path}.{name}")


def group_within(paths: Sequence[str], group: Group) -> Group:
    """The group of a part in the names of the whole model, in which the part stands at ``paths``."""
    producers, consumers = (
        tuple(
            replace(
                member,
                name=f"{paths[0]}.{member.name}",
                aliases=tuple(f"{path}.{name}" for path in paths for name in member.names)[1:],
            )
            for member in members
        )
        for members in (group.producers, group.consumers)
    )
    return replace(group, name=f"{paths[0]}.{group.name}", producers=producers, consumers=consumers)


def line_within(path: str, line: Line) -> Line:
    """The line of a part's report in the names of the whole model."""
    producers, consumers = (
        tuple((f"{path}.{name}", dim) for name, dim in members)
        for members in (line.producers, line.consumers)
    )
    return replace(line, name=f"{path}.{line.name}", producers=producers, consumers=consumers)


def plan_of_part(plan: PruningPlan, path: str) -> PruningPlan:
    """The groups of a whole plan that lie in a part, in the names of the part."""
    start = f"{path}."
    groups = tuple(group for group in plan.groups if group.name.startswith(start))
    return _mapped(
        replace(plan, groups=groups, splits=(), folds=(), fixed=()),
        lambda name: name.removeprefix(start),
    )


def _mapped(plan: PruningPlan, change: Callable[[str], str]) -> PruningPlan:
    groups = tuple(
        replace(
            group,
            name=change(group.name),
            producers=tuple(replace(part, name=change(part.name)) for part in group.producers),
            consumers=tuple(replace(part, name=change(part.name)) for part in group.consumers),
        )
        for group in plan.groups
    )
    splits = tuple(
        replace(split, name=change(split.name), source=change(split.source)) for split in plan.splits
    )
    folds = tuple(
        replace(weight, name=change(weight.name), sources=tuple(map(change, weight.sources)))
        for weight in plan.folds
    )
    fixed = tuple(replace(buffer, name=change(buffer.name)) for buffer in plan.fixed)
    return replace(plan, groups=groups, splits=splits, folds=folds, fixed=fixed)


# --- What is counted, and known, of all parts together.


_OF_ONE_PROGRAM = {"program", "conflicts", "labels", "numbering", "walk"}


class Joined(Resource):
    """What is counted in several programs as one.

    Args:
        groups: those of all programs, in the names of the model.
        parts: what is counted in each.
        times: how often each counts.
        around: how much there is of it outside of them.
    """

    def __init__(
        self, groups: Sequence[Group], parts: Sequence[Resource], times: Sequence[int], around: float
    ) -> None:
        super().__init__(groups, around + sum(n * part.whole for n, part in zip(times, parts, strict=True)))
        self._parts, self._times, self._around = parts, times, around

    def used(self, lost: Sequence[int]) -> float:
        left, found = iter(lost), self._around
        for part, times in zip(self._parts, self._times, strict=True):
            found += times * part.used([next(left) for _ in part.groups])
        return found


class PartsAnalysis(Analysis):
    """What :func:`fasp_fx.analyze` returns for a model that cannot be captured as a whole.

    Attributes:
        parts: the analysis of each captured submodule, by its path; the names in them are those of the
            submodule.
        left: for each submodule that stays whole, why.
        groups: the groups of all parts in the order in which the model calls them, in the names of the whole
            model.
    """

    parts: Mapping[str, Analysis]
    left: Mapping[str, str]

    def __init__(
        self, parts: Mapping[str, Analysis], left: Mapping[str, str], groups: Sequence[Group]
    ) -> None:
        self.parts, self.left, self.groups = dict(parts), dict(left), list(groups)
        one = next(iter(parts.values()))
        self.granularity, self.include = one.granularity, one.include

    @property
    def max_sparsity(self) -> float:
        """The highest sparsity of all parts together that can be asked for with ``round_to=1``."""
        counted = [Sparsity(analysis) for analysis in self.parts.values()]
        return Joined(self.chosen, counted, [1] * len(counted), 0).reach(1)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_ONE_PROGRAM:
            raise CaptureError(
                f"a model analysed in parts has no single '{name}'; analysis.parts holds the analysis of each"
                " part"
            )
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __repr__(self) -> str:
        return f"PartsAnalysis(parts={list(self.parts)}, left={self.left})"


class InParts(Subject):
    """A model that is pruned in parts: each is exchanged for a smaller one while the others wait.

    Args:
        captured: the model.
        is_own: whether nobody else has it, so that it may become the result.
    """

    def __init__(self, captured: CapturedParts, is_own: bool) -> None:
        super().__init__(captured.programs)
        self.captured = captured
        self.model = captured.model if is_own else copied(captured.model)
        self.parts = {part.path: part for part in captured.parts}
        self.originals = {path: self.model.get_submodule(path) for path in self.parts}
        self.before = self._parameters()
        self.left, self.results = dict(captured.left), dict[str, Result]()
        self._failure: VerificationError | None = None

    def analyze(self, asked: PruningConfig | PruningPlan) -> Analysis:
        for path, part in self.parts.items():
            analysis = analyze_for(part.program, asked)
            if analysis.chosen:
                self.analyses[path] = analysis
                continue
            reasons = sorted({group.reason for group in analysis.groups if group.reason})[:3]
            self.left[path] = "nothing in it can be pruned" + (f": {'; '.join(reasons)}" if reasons else "")
        if not self.analyses:
            raise nothing_left(self.captured.error, self.left)
        return self._joint()

    def _joint(self) -> PartsAnalysis:
        groups = [self.within(path, group) for path, own in self.analyses.items() for group in own.groups]
        return PartsAnalysis(self.analyses, self.left, groups)

    def within(self, path: str, group: Group) -> Group:
        return group_within(self.parts[path].paths, group)

    def fingerprint(self) -> str:
        fixed = {
            f"{path}.{name}": tensor
            for path, program in self.programs.items()
            for name, tensor in program.fixed().items()
        }
        return whole_fingerprint({**self.before, **fixed})

    def count(self, cap: Cap | None) -> Resource:
        if isinstance(cap, Latency):  # a function of all widths
            return cap.resource(self._joint())
        times = [self.parts[path].calls if cap is not None and cap.per_call else 1 for path in self.analyses]
        inside = {id(tensor) for path in self.analyses for tensor in self.originals[path].parameters()}
        around = {id(tensor): tensor for tensor in self.before.values() if id(tensor) not in inside}
        return Joined(
            self.chosen(),
            [counted(analysis, cap) for analysis in self.analyses.values()],
            times,
            0 if cap is None else cap.held(around.values()),
        )

    def trial(self, trials: Mapping[str, ModelTrial]) -> ServedTrial | None:
        return JoinedTrial(self, trials) if trials else None

    def read(self, calibration: Iterable[Any] | None) -> list[Call]:
        device = next((tensor.device for tensor in self.captured.call.tensors()), None)
        batches = []
        for index, (args, kwargs) in enumerate(calibration_calls(calibration)):
            call = Call(args, kwargs).to(device)
            for tensor in call.tensors():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise CalibrationError(
                        f"calibration batch {index} holds values that are not finite; remove or repair them"
                    )
            batches.append(call)
        served = self._found(self.analyses, batches, keep=False)
        self.unserved = {path for path in self.analyses if not served[path]}
        return batches

    def leaves(self, batches: list[Call]) -> list[list[Any]]:
        return [call.leaves() for call in batches]

    def inputs(self, path: str, batches: list[Call]) -> list[list[Any]]:
        return self._found([path], batches)[path]

    def _found(
        self, paths: Iterable[str], batches: list[Call], keep: bool = True
    ) -> dict[str, list[list[Any]]]:
        """What each call of some parts brings to the inputs of their graphs, while every batch runs once;
        nothing where a part does not take one of its calls.

        Args:
            keep: ``False`` tells only how many calls there are.
        """
        modules = {self.originals[path]: path for path in paths}
        found = {path: list[list[Any]]() for path in paths}
        unfit = dict[str, str]()

        def note(module: nn.Module, call: Call) -> None:
            path = modules[module]
            if all(tensor.numel() for tensor in call.tensors()):
                try:
                    taken = self.programs[path].flat_inputs(call.args, call.kwargs)
                    check_inputs(self.programs[path], taken, "a call on the calibration data")
                    found[path].append(taken if keep else [])
                except tolerable(CallError, CalibrationError) as error:
                    unfit.setdefault(path, first_line(error))

        for index, batch in enumerate(batches):
            with watching(modules, note):
                self._run(index, batch)
        for path in paths:
            if path in unfit or not found[path]:
                self.left[path] = unfit.get(path, "the calibration data never reaches it")
                found[path].clear()
        return found

    def leaves_whole(self, path: str, lost: Sequence[int]) -> bool:
        if not any(lost):
            self.left.setdefault(path, "what was asked for takes nothing from it")
        return not any(lost)

    def removed_by(self, plan: PruningPlan) -> dict[str, np.ndarray]:
        plans.check_fingerprint(plan, whole_fingerprint(self.before))
        owned = {path: plan_of_part(plan, path) for path in self.analyses}
        known = {f"{path}.{group.name}" for path, own in owned.items() for group in own.groups}
        stray = next((group.name for group in plan.groups if group.name not in known), None)
        if stray is not None:
            raise PlanError(
                f"group '{stray}' of the plan is in no part that was captured here; use the example inputs"
                " that the plan was made with"
            )
        return {path: plans.gone_of(own, self.analyses[path]) for path, own in owned.items() if own.groups}

    def put(self, path: str, decision: Decision, config: PruningConfig | None, clock: Timings) -> None:
        """If nothing of a part can go, or the model does not run with the smaller one, it stays whole.

        Raises:
            PlanError: it does, and a plan is replayed (``config=None``).
        """
        paths, original = self.parts[path].paths, self.originals[path]
        try:
            result = rewrite(self.programs[path], self.analyses[path], decision, None, clock)
            put(self.model, paths, dressed(result.module, original))
            self._run_example()
            self.results[path] = result
        except tolerable(VerificationError) as failure:
            put(self.model, paths, original)
            self.left[path], self._failure = first_line(failure), failure
            warn(f"part '{path}' stays whole: {first_line(failure)}", VerificationWarning)
            if config is None:
                raise PlanError(f"part '{path}' of the plan cannot be put back: {failure}") from failure

    def _run_example(self) -> None:
        """Run the model, with what was put, on its example inputs.

        Raises:
            VerificationError: it fails.
        """
        try:
            with rewound(self.model):
                self.captured.call.run(self.model)
        except tolerable(Exception) as failure:
            raise VerificationError(
                "the model does not run with the smaller part in its place:"
                f" {type(failure).__name__}: {first_line(failure)}"
            ) from failure

    def result(self, config: PruningConfig | None, clock: Timings) -> Result:
        """Everything put together.

        Raises:
            VerificationError: nothing is left of what was decided.
        """
        if self._failure is not None and not self.results:
            raise self._failure
        plan = self._plan()
        removed = {group.name: group.removed_sets for group in plan.groups}
        lost = [removed.get(group.name, 0) for group in self.chosen()]
        plan = replace(plan, sparsity=self.count(None).removed(lost))
        old, new = weight_size(self.before), weight_size(self._parameters())
        rules = Counter[str]()
        for result in self.results.values():
            rules.update(result.report.without_rule)
        report = Report(
            plan.sparsity,
            None if config is None else config.target_sparsity,
            (old[0], new[0]),
            (old[1], new[1]),
            tuple(line_within(path, line) for path, own in self.results.items() for line in own.report.lines),
            dict(clock.seconds),
            (*self._remarks(), *self.notes),
            without_rule=dict(rules),
            include=plan.include,
            budgets=() if config is None else tuple(self._spent(cap, lost) for cap in config.budgets),
            config=config,
        )
        module = cast(fx.GraphModule, self.model)
        return Result(module, plan, report, self.captured.signature, self.results, self.left)

    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def _plan(self) -> PruningPlan:
        plans_of_parts = [plan_within(path, result.plan) for path, result in self.results.items()]
        one = next(iter(self.analyses.values()))
        return PruningPlan(
            whole_fingerprint(self.before),
            tuple(chain.from_iterable(plan.groups for plan in plans_of_parts)),
            0.0,
            tuple(chain.from_iterable(plan.splits for plan in plans_of_parts)),
            whole_fingerprint(self._parameters()),
            granularity=tuple(sorted(one.granularity)),
            include=tuple(sorted(one.include)),
            folds=tuple(chain.from_iterable(plan.folds for plan in plans_of_parts)),
            fixed=tuple(chain.from_iterable(plan.fixed for plan in plans_of_parts)),
        )

    def _spent(self, cap: Cap, lost: Sequence[int]) -> Spent:
        resource = self.count(cap)
        return Spent(cap.name, cap.unit, cap.allowed(resource.whole), resource.whole, resource.used(lost))

    def _remarks(self) -> Iterator[str]:
        error = self.captured.error
        reason = first_line(error.__cause__ or error)
        yield f"pruned in parts, because the model cannot be captured as a whole: {reason}"
        for path in self.results:
            part = self.parts[path]
            others = f", also at {', '.join(map(repr, part.paths[1:]))}" if len(part.paths) > 1 else ""
            yield f"part '{path}' ({part.calls} {'call' if part.calls == 1 else 'calls'} seen{others})"
        yield from (f"'{path}' is no part: {why}" for path, why in self.left.items())
        noted: dict[str, str] = {}
        for path, result in self.results.items():
            noted = dict.fromkeys(result.report.notes, path) | noted
        yield from (f"in '{path}': {note}" for note, path in noted.items())

    def _run(self, index: int, batch: Call) -> None:
        """Run the model on a batch.

        Raises:
            CalibrationError: it fails.
        """
        try:
            with rewound(self.model):
                batch.run(self.model)
        except tolerable(Exception) as failure:
            raise CalibrationError(
                f"calibration batch {index} fails in the model: {type(failure).__name__}:"
                f" {first_line(failure)}; a batch is a tensor, a tuple of positional arguments or a dict of"
                " keyword arguments, so a model that takes a list takes it as (list,), and one that takes no"
                " labels is given none: calibration=(batch[0] for batch in loader)"
            ) from failure


class JoinedTrial(ServedTrial):
    """The trials of several parts as one: their losses are added up, each of its own outputs."""

    def __init__(self, subject: InParts, trials: Mapping[str, ModelTrial]) -> None:
        one = next(iter(trials.values()))
        count = min(trial.count for trial in trials.values())
        super().__init__(count, f"{one.fitness.description} of all parts together", subject.chosen())
        self._subject, self._trials = subject, trials

    def losses(self, lost: Sequence[int], sequences: Sequence[int]) -> list[float]:
        shares = self._subject.split(self.taken(lost, sequences))
        found = [trial.losses(shares[path], sequences) for path, trial in self._trials.items()]
        return [sum(own) for own in zip(*found, strict=True)]


__all__ = ["InParts", "Joined", "PartsAnalysis"]
