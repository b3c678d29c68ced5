"""A model that cannot be captured as a whole, captured and pruned by the submodules that can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ...allocation._selection import is_excluded
from ...allocation.budgets import Cap, Latency
from ...analysis import plan as plans
from ...analysis._analysis import Analysis
from ...analysis.groups import Group
from ...analysis.plan import PruningPlan
from ...analysis.resources import Resource, Sparsity
from ...base._device import device_named
from ...base._tolerable import tolerable
from ...base._warn import warn
from ...calibration._calibration import calibration_calls
from ...calibration._trial import ModelTrial, ServedTrial
from ...calibration._visit import Decision
from ...capturing._captured import Captured
from ...capturing._signature import CallSignature
from ...capturing._transformers import is_transformers, register_caches
from ...capturing._unchanged import noting_reads, rewound, said_of_reads
from ...errors import (
    ArgumentError,
    CalibrationError,
    CaptureError,
    ExportError,
    FaspError,
    PlanError,
    VerificationError,
    VerificationWarning,
    first_line,
)
from .._result import Result
from .._rewriting import Timings, analyze_for, rewrite
from .._subject import Subject
from ..config import PruningConfig
from ..report import Report, Spent, weight_size
from ._analysis import Joined, PartsAnalysis, group_within, line_within, plan_of_part, plan_within
from ._calls import Call, watching
from ._result import PartsResult
from ._stand_in import copied, dressed, put, replaced, whole_fingerprint
from ._submodules import Part, Search, why_unfit

_UNREACHED = "the calibration data never reaches it"


@dataclass(frozen=True, kw_only=True, repr=False)
class CapturedParts(Captured):
    """A model captured by its submodules.

    Attributes:
        model: a copy of the caller's, in which the parts stand.
        call: the example inputs.
        signature: how the caller's is called.
        error: why it cannot be captured as a whole.
        parts: what was captured, in the order in which the model calls it.
        left: for each submodule that was not, why.
    """

    model: nn.Module
    call: Call
    signature: CallSignature
    error: CaptureError
    parts: tuple[Part, ...]
    left: Mapping[str, str]

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedParts:
        return self  # it holds weights of its own, which nothing changes

    def __repr__(self) -> str:
        return f"CapturedParts({list(self.programs)}, left={dict(self.left)})"


def capture_parts(
    error: CaptureError,
    model: Any,
    args: Any,
    kwargs: dict[str, Any] | None,
    device: torch.device | str | None,
) -> CapturedParts:
    """Capture the largest submodules of a model that can be.

    Args:
        error: why the model cannot be captured as a whole.

    Raises:
        CaptureError: none of its submodules can be captured either.
    """
    call = Call(args if isinstance(args, tuple) else (args,), dict(kwargs or {}))
    signature = CallSignature.of(model.forward, call.args, call.kwargs)
    neither = f"{error} It cannot be pruned by its submodules either"
    try:
        copy = copied(model)
    except tolerable(Exception) as failure:
        raise CaptureError(f"{neither}, because it cannot be copied: {first_line(failure)}") from failure
    for module in copy.modules():
        if is_transformers(module):
            register_caches(module)  # before calls are recorded, so that what they hold is copied
    if device is not None:
        target = device_named(device)
        copy, call = copy.to(target), call.map(lambda tensor: tensor.to(target))
    search = Search(copy, call)
    try:
        # what a model compiles for itself would not be run
        compiled = torch.compiler.set_stance("force_eager")
        with rewound(model), rewound(copy), compiled, noting_reads(model, copy) as read:
            call.run(copy)
        if read:
            raise CaptureError(f"{neither}: {said_of_reads(model, read)}.")
        parts = tuple(search.run())
    except FaspError:
        raise
    except tolerable(Exception) as failure:
        raise CaptureError(
            f"{neither}, because it does not run on the example inputs: {type(failure).__name__}:"
            f" {first_line(failure)}"
        ) from failure
    if not parts:
        raise _nothing(error, search.left)
    return CapturedParts(
        programs={part.path: part.program for part in parts},
        _versions={},
        model=copy,
        call=call,
        signature=signature,
        error=error,
        parts=parts,
        left=search.left,
    )


def check_parts_help(error: CaptureError, model: Any, dynamic_shapes: Any, **options: object) -> None:
    """Go on only where submodules can help: the exporter failed on the code of a model whose weights are
    there, and no option speaks of the whole of it.

    Raises:
        CaptureError: ``error``, where they cannot, or with ``dynamic_shapes``.
        ArgumentError: another option speaks of a model captured as a whole; names it.
    """
    if dynamic_shapes is not None or not isinstance(error, ExportError) or not isinstance(model, nn.Module):
        raise error
    for name, value in options.items():
        if value:
            shown = f"{name}=" if value is True else f"{name}={value!r}"
            raise ArgumentError(
                f"{shown} needs a model that is captured as a whole; leave it out to prune this one by its"
                " submodules"
            ) from error
    tensors = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(tensor) or tensor.device.type == "meta" for tensor in tensors):
        raise error


class InParts(Subject):
    """A model that is pruned in parts: each is exchanged for a smaller one while the others wait.

    Args:
        captured: the model; as it was, once the result is made.
        is_own: whether nobody else has it, so that it may become the result.
    """

    def __init__(self, captured: CapturedParts, is_own: bool) -> None:
        super().__init__(captured.programs)
        self.captured, self.model, self._is_own = captured, captured.model, is_own
        self.parts = {part.path: part for part in captured.parts}
        self.before = dict(self.model.named_parameters(remove_duplicate=False))
        self.left, self.results = dict(captured.left), dict[str, Result]()
        self._unsound: dict[str, str] = {}
        self._calls: tuple[str, list[Call]] = "", []

    def analyze(self, asked: PruningConfig | PruningPlan) -> Analysis:
        for path, part in self.parts.items():
            analysis = analyze_for(part.program, asked)
            if analysis.chosen:
                self.analyses[path] = analysis
                continue
            reasons = sorted({group.reason for group in analysis.groups if group.reason})[:3]
            self.left[path] = "nothing in it can be pruned" + (f": {'; '.join(reasons)}" if reasons else "")
        if not self.analyses:
            raise _nothing(self.captured.error, self.left)
        return self._joint()

    def _joint(self) -> PartsAnalysis:
        places = {path: part.paths for path, part in self.parts.items()}
        return PartsAnalysis(self.analyses, self.left, places)

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
        counted = [
            Sparsity(analysis) if cap is None else cap.resource(analysis)
            for analysis in self.analyses.values()
        ]
        pruned = [self.parts[path] for path in self.analyses]
        times = [part.calls if cap is not None and cap.per_call else 1 for part in pruned]
        inside = {id(tensor) for part in pruned for tensor in part.module.parameters()}
        around = {id(tensor): tensor for tensor in self.before.values() if id(tensor) not in inside}
        return Joined(list(self._chosen()), counted, times, 0 if cap is None else cap.held(around.values()))

    def trial(self, trials: Mapping[str, ModelTrial]) -> ServedTrial | None:
        return JoinedTrial(self, trials) if trials else None

    def read(self, calibration: Iterable[Any] | None) -> list[Call]:
        device = next((tensor.device for tensor in self.captured.call.tensors()), None)
        batches = []
        for index, (args, kwargs) in enumerate(calibration_calls(calibration)):
            call = Call(args, kwargs)
            if device is not None:
                call = call.map(lambda tensor: tensor.to(device))
            for tensor in call.tensors():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise CalibrationError(
                        f"calibration batch {index} holds values that are not finite; remove or repair them"
                    )
            batches.append(call)
        return batches

    def leaves(self, batches: list[Call]) -> Iterator[list[Any]]:
        return (call.leaves() for call in batches)

    def inputs(self, path: str, batches: list[Call]) -> tuple[list[list[Any]], str]:
        part, calls = self.parts[path], list[Call]()
        for index, batch in enumerate(batches):
            with watching([part.module], lambda _, call: calls.append(call.held())):
                self._run(index, batch)
        self._calls = path, calls
        flat = []
        for call in calls:
            if all(tensor.numel() for tensor in call.tensors()):
                if misfit := why_unfit(part.program, call):
                    return [], f"a call on the calibration data does not fit its graph: {misfit}"
                flat.append(part.program.flat_inputs(call.args, call.kwargs))
        return flat, "" if flat else _UNREACHED

    def unreached(self, batches: list[Call]) -> dict[str, str]:
        """The parts that no batch brings any data to; runs batches until all parts got some."""
        waiting = {path: self.parts[path].module for path in self.analyses}

        def see(module: nn.Module, call: Call) -> None:
            if all(tensor.numel() for tensor in call.tensors()):
                for path in [path for path, own in waiting.items() if own is module]:
                    del waiting[path]

        for index, batch in enumerate(batches):
            if waiting:
                with watching({id(module): module for module in waiting.values()}.values(), see):
                    self._run(index, batch)
        return dict.fromkeys(waiting, _UNREACHED)

    def leaves_whole(
        self, path: str, lost: list[int], config: PruningConfig, batches: Any, missed: Mapping[str, str]
    ) -> bool:
        if any(lost):
            misfit = "" if batches is None else self.inputs(path, batches)[1]
        else:
            misfit = missed.get(path) or self._why_nothing(path, config)
        if misfit:
            self.left[path] = misfit
        return bool(misfit)

    def _why_nothing(self, path: str, config: PruningConfig) -> str:
        """Why the allocation takes nothing from a part that the data serve."""
        if all(is_excluded(self.within(path, group), config.exclude) for group in self.analyses[path].chosen):
            return "exclude= leaves it whole"
        if isinstance(config.sparsity, Mapping):
            return "no pattern of sparsity= asks for channels that its weights read"
        if callable(config.allocation):
            return "the allocation takes nothing from it"
        return "a sparsity this low takes nothing from it"

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
        part = self.parts[path]
        try:
            result = rewrite(part.program, self.analyses[path], decision, None, clock)
        except tolerable(VerificationError) as failure:
            self._unsound[path] = first_line(failure)
            self._leave(path, first_line(failure), config)
            warn(f"part '{path}' stays whole: {first_line(failure)}", VerificationWarning)
            return
        module = dressed(result.module, part.module)  # in place, so that the result of the part holds it
        calls = self._calls[1] if self._calls[0] == path else []
        try:
            with replaced(self.model, part.paths, part.module, module), rewound(self.model):
                for call in {call.key(): call for call in calls}.values():
                    with rewound(module):
                        call.run(module)
                self.captured.call.run(self.model)
        except tolerable(Exception) as failure:
            said = f"{type(failure).__name__}: {first_line(failure)}"
            self._leave(path, f"the model does not run with the smaller part in its place: {said}", config)
            return
        put(self.model, part.paths, module)
        self.results[path] = result

    def _leave(self, path: str, why: str, config: PruningConfig | None) -> None:
        self.left[path] = why
        if config is None:
            raise PlanError(f"part '{path}' of the plan cannot be put back: {why}")

    def result(self, config: PruningConfig | None, clock: Timings) -> PartsResult:
        """Everything put together.

        Raises:
            VerificationError: nothing is left of what was decided.
        """
        if self._unsound and not self.results:
            raise VerificationError(
                "; ".join(f"part '{path}': {reason}" for path, reason in self._unsound.items())
            )
        model = self._taken_out()
        plan = self._plan(model)
        removed = {group.name: group.removed_sets for group in plan.groups}
        lost = [removed.get(group.name, 0) for group in self._chosen()]
        plan = replace(plan, sparsity=self.count(None).removed(lost))
        old, new = weight_size(self.before), weight_size(dict(model.named_parameters(remove_duplicate=False)))
        rules = [Counter(result.report.without_rule) for result in self.results.values()]
        report = Report(
            plan.sparsity,
            None if config is None else config.target_sparsity,
            (old[0], new[0]),
            (old[1], new[1]),
            tuple(line_within(path, line) for path, own in self.results.items() for line in own.report.lines),
            dict(clock.seconds),
            (*self._remarks(), *self.notes),
            without_rule=dict(sum(rules, Counter[str]())),
            include=plan.include,
            budgets=() if config is None else tuple(self._spent(cap, lost) for cap in config.budgets),
            config=config,
        )
        return PartsResult(model, plan, report, self.captured.signature, self.results, self.left)

    def _taken_out(self) -> nn.Module:
        """The model with the smaller parts; where others have it, a copy, and the parts go back."""
        if self._is_own:
            return self.model
        smaller = {id(own.module): own.module for own in self.results.values()}
        made = copied(self.model, smaller)
        for path in self.results:
            put(self.model, self.parts[path].paths, self.parts[path].module)
        return made

    def _plan(self, model: nn.Module) -> PruningPlan:
        renamed = [plan_within(path, result.plan) for path, result in self.results.items()]
        one = next(iter(self.analyses.values()))
        return PruningPlan(
            whole_fingerprint(self.before),
            tuple(group for own in renamed for group in own.groups),
            0.0,
            tuple(split for own in renamed for split in own.splits),
            whole_fingerprint(dict(model.named_parameters(remove_duplicate=False))),
            granularity=tuple(sorted(one.granularity)),
            include=tuple(sorted(one.include)),
            folds=tuple(weight for own in renamed for weight in own.folds),
            copies=tuple(copied for own in renamed for copied in own.copies),
            fixed=tuple(buffer for own in renamed for buffer in own.fixed),
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
        for path, why in self.left.items():
            inside = any(other.startswith(f"{path}.") for other in self.results)
            yield (
                f"'{path}' is pruned only by its submodules: {why}"
                if inside
                else f"left '{path}' whole: {why}"
            )
        notes = [(path, note) for path, result in self.results.items() for note in result.report.notes]
        for note, count in Counter(note for _, note in notes).items():
            first = next(path for path, other in notes if other == note)
            yield f"in '{first}'{f' and {count - 1} more' if count > 1 else ''}: {note}"

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
        super().__init__(count, f"{one.fitness.description} of all parts together", list(subject._chosen()))
        self._subject, self._trials = subject, trials

    def losses(self, lost: Sequence[int], sequences: Sequence[int]) -> list[float]:
        shares = self._subject.split(self.taken(lost, sequences))
        found = [trial.losses(shares[path], sequences) for path, trial in self._trials.items()]
        return [sum(own) for own in zip(*found, strict=True)]


def _nothing(error: CaptureError, left: Mapping[str, str]) -> CaptureError:
    reasons = "; ".join(f"'{path}': {reason}" for path, reason in left.items())
    found = CaptureError(
        f"{error} No submodule can be pruned by itself either{f': {reasons}' if reasons else ''}."
    )
    found.__cause__ = error.__cause__
    return found


__all__ = ["CapturedParts", "InParts", "capture_parts", "check_parts_help"]
