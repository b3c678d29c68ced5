"""Prune a model that cannot be captured as a whole by the submodules that can."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from . import plan as plans
from ._calibration import calibration_calls
from ._calls import Call, rewound, watching
from ._observe import Decision
from ._program import Program
from ._result import Result
from ._signature import CallSignature
from ._stand_in import dressed, put, replaced
from ._submodules import Analyze, Capture, Part, Search, why_unfit
from ._transformers import is_transformers, register_caches
from .allocation import Budget
from .analysis import Analysis
from .errors import CalibrationError, CaptureError, FaspError, PlanError, StoreError, first_line
from .plan import PruningPlan
from .report import Line, Report, weight_size

Observe = Callable[[Analysis, list[int], list[list[Any]] | None, Callable[[float], None]], Decision]
Rewrite = Callable[[Program, Analysis, Decision], Result]


@dataclass(frozen=True)
class Stages:
    """The stages of the pipeline that every part goes through, with the caller's options bound in."""

    capture: Capture
    analyze: Analyze
    rewrite: Rewrite


class PartsResult(Result):
    """What :func:`fasp_fx.prune` returns for a model that cannot be captured as a whole.

    Attributes:
        module: a copy of the caller's model with the pruned parts in place of the submodules that were captured.
        parts: the result of each captured submodule, by its path; plans and reports in them use the names of the submodule.
        left: for each submodule that stayed whole, why.
        plan: what was removed, in the names of the whole model; :func:`fasp_fx.apply` replays it.
        report: the figures of all parts together; its notes say which parts there are and what was left.
    """

    parts: Mapping[str, Result]
    left: Mapping[str, str]

    def __init__(
        self, module: nn.Module, plan: PruningPlan, report: Report, signature: CallSignature, parts: Mapping[str, Result], left: Mapping[str, str]
    ) -> None:
        fields = {"module": module, "plan": plan, "report": report, "signature": signature, "parts": dict(parts), "left": dict(left)}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def program(self) -> ExportedProgram:
        """A model pruned in parts has none.

        Raises:
            CaptureError: always; says where the programs of the parts are.
        """
        raise CaptureError("a model pruned in parts has no single program; result.parts holds the result of each part, with its program")

    def save(self, path: str | Path, *, overwrite: bool = False) -> NoReturn:
        """A model pruned in parts cannot be saved without the code of the model.

        Raises:
            StoreError: always; says how to keep the result.
        """
        raise StoreError(
            "a model pruned in parts is Python code between graphs, which save() does not store; keep result.plan.to_json() and "
            "result.module.state_dict(): fasp_fx.apply(model, plan, args).module.load_state_dict(state) makes it again from the dense model"
        )

    def __repr__(self) -> str:
        return f"PartsResult(parts={list(self.parts)}, left={self.left}, sparsity={self.plan.sparsity:.4f})"

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class JoinedBudget(Budget):
    """The budgets of several parts as one: sparsity is the fraction removed of all their counted weights."""

    def __init__(self, budgets: list[Budget]) -> None:
        self.budgets = budgets
        self.groups = [group for budget in budgets for group in budget.groups]
        self.total = sum(budget.total for budget in budgets)

    def split(self, lost: list[int]) -> list[list[int]]:
        """One list for the groups of each part."""
        found, start = [], 0
        for budget in self.budgets:
            found.append(lost[start : start + len(budget.groups)])
            start += len(budget.groups)
        return found

    def sparsity(self, lost: list[int]) -> float:
        return self.average([budget.sparsity(own) for budget, own in zip(self.budgets, self.split(lost), strict=True)])

    def average(self, sparsities: list[float]) -> float:
        """The sparsity of the whole, from those of the parts."""
        return sum(budget.total * own for budget, own in zip(self.budgets, sparsities, strict=True)) / max(self.total, 1)


class _Assembly:
    """A copy of the model in which the parts are exchanged one by one."""

    def __init__(self, error: CaptureError, model: Any, args: Any, kwargs: dict[str, Any] | None, stages: Stages, device: torch.device | str | None) -> None:
        self.error, self.stages, self.seconds = error, stages, dict[str, float]()
        call = Call(args if isinstance(args, tuple) else (args,), dict(kwargs or {}))
        self.signature = CallSignature.of(model.forward, call.args, call.kwargs)
        self.before = dict(model.named_parameters(remove_duplicate=False))
        self.device = None if device is None else torch.device(device)
        self.model = _copy(model, error)
        for module in self.model.modules():
            if is_transformers(module):
                register_caches(module)  # before calls are recorded, so that what they hold is copied
        self.call = call
        if self.device is not None:
            self.model, self.call = self.model.to(self.device), call.map(lambda tensor: tensor.to(self.device))
        with self.timed("capture"):
            search = Search(self.model, self.call, stages.capture, stages.analyze)
            try:
                self.parts = search.run()
            except (FaspError, torch.OutOfMemoryError):
                raise
            except Exception as failure:
                raise CaptureError(
                    f"{error} It cannot be pruned by its submodules either, because it does not run on the example inputs: "
                    f"{type(failure).__name__}: {first_line(failure)}"
                ) from failure
        self.left = search.left
        if not self.parts:
            reasons = "; ".join(f"'{path}': {reason}" for path, reason in self.left.items())
            raise CaptureError(f"{error} No submodule can be pruned by itself either{f': {reasons}' if reasons else ''}.") from error.__cause__
        self.budget = JoinedBudget([Budget(part.analysis) for part in self.parts])
        self.results: dict[str, Result] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._spend(stage, time.perf_counter() - start)

    def _spend(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def place(self, part: Part, decision: Decision, calls: list[Call]) -> bool:
        """Prune a part and put it in its place; if the model does not run with it, the part stays whole."""
        result = self.stages.rewrite(part.program, part.analysis, decision)
        for stage in ("passes", "export"):
            self._spend(stage, result.report.seconds.get(stage, 0.0))
        module = dressed(result.module, part.module)  # in place, so that the result of the part holds it
        try:
            with replaced(self.model, part.paths, part.module, module), rewound(self.model):
                for call in {call.key(): call for call in calls}.values():
                    with rewound(module):
                        call.run(module)
                self.call.run(self.model)
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            self.left[part.path] = f"the model does not run with the smaller part in its place: {type(failure).__name__}: {first_line(failure)}"
            return False
        put(self.model, part.paths, module)
        self.results[part.path] = result
        return True

    def result(self, requested: float | None) -> PartsResult:
        """Everything put together."""
        sparsities = [self.results[part.path].plan.sparsity if part.path in self.results else 0.0 for part in self.parts]
        reached = self.budget.average(sparsities)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        renamed = [_renamed(path, result.plan) for path, result in self.results.items()]
        plan = PruningPlan(
            _fingerprint(self.before),
            tuple(group for own in renamed for group in own.groups),
            reached,
            tuple(split for own in renamed for split in own.splits),
            _fingerprint(parameters),
            granularity=tuple(sorted(self.parts[0].analysis.granularity)),
            include=tuple(sorted(self.parts[0].analysis.include)),
            folds=tuple(weight for own in renamed for weight in own.folds),
        )
        old, new = weight_size(self.before), weight_size(parameters)
        lines = tuple(_line_within(path, line) for path, result in self.results.items() for line in result.report.lines)
        without_rule = sum((Counter(result.report.without_rule) for result in self.results.values()), Counter[str]())
        sizes = (old[0], new[0]), (old[1], new[1])
        report = Report(reached, requested, *sizes, lines, dict(self.seconds), tuple(self._notes()), without_rule=dict(without_rule))
        return PartsResult(self.model, plan, report, self.signature, self.results, self.left)

    def _notes(self) -> Iterator[str]:
        reason = first_line(self.error.__cause__ or self.error)
        yield f"pruned in parts, because the model cannot be captured as a whole: {reason}"
        for part in self.parts:
            if part.path in self.results:
                others = f", also at {', '.join(map(repr, part.paths[1:]))}" if len(part.paths) > 1 else ""
                yield f"part '{part.path}' ({part.calls} {'call' if part.calls == 1 else 'calls'} seen{others})"
        for path, why in self.left.items():
            inside = any(other.startswith(f"{path}.") for other in self.results)
            yield f"'{path}' is pruned only by its submodules: {why}" if inside else f"left '{path}' whole: {why}"
        notes = [(path, note) for path, result in self.results.items() for note in result.report.notes]
        for note, count in Counter(note for _, note in notes).items():
            paths = [path for path, other in notes if other == note]
            yield f"in '{paths[0]}'{f' and {count - 1} more' if count > 1 else ''}: {note}"


def prune_in_parts(
    error: CaptureError,
    model: Any,
    args: Any,
    kwargs: dict[str, Any] | None,
    stages: Stages,
    *,
    allocate: Callable[[Budget], list[int]],
    observe: Observe,
    calibration: Iterable[Any] | None,
    needs_data: bool,
    requested: float,
    propagate: bool,
    device: torch.device | str | None,
    progress: Callable[[float], None],
    on_analysis: Callable[[Analysis], None] | None,
) -> PartsResult:
    """Prune the largest submodules that can be captured, and put them back into a copy of the model.

    Args:
        error: why the model cannot be captured as a whole.
        allocate: how many channel sets each block of each group loses.
        observe: decides what goes, from the inputs of a part.
        needs_data: whether score or restoration use calibration data.
        propagate: whether a part is observed behind the parts already pruned.

    Raises:
        CaptureError: ``error``, if submodules cannot help or none can be pruned.
        SparsityError: the parts cannot reach the sparsity together.
        CalibrationError: the calibration data does not fit.
    """
    _check_can_help(error, model)
    assembly = _Assembly(error, model, args, kwargs, stages, device)
    shares = assembly.budget.split(allocate(assembly.budget))
    if on_analysis is not None:
        for part in assembly.parts:
            on_analysis(part.analysis)
    with assembly.timed("calibration"):
        batches = _user_batches(calibration, assembly.device) if needs_data else None
    modules: dict[str, nn.Module] = {}
    for index, (part, lost) in enumerate(zip(assembly.parts, shares, strict=True)):
        progress(index / len(assembly.parts))
        if not any(lost):
            assembly.left[part.path] = "a sparsity this low takes nothing from it"
            continue
        with assembly.timed("calibration"):
            calls = [] if batches is None else _recorded(assembly.model, part.module, batches)
            flat, misfit = _inputs(part, calls)
            if batches is not None and not flat:
                assembly.left[part.path] = misfit or "the calibration data never reaches it"
                continue

            def advance(fraction: float, done: int = index) -> None:
                progress((done + fraction) / len(assembly.parts))

            decision = observe(part.analysis, lost, flat if batches is not None else None, advance)
            del flat
        if assembly.place(part, decision, calls) and not propagate:
            modules[part.path] = assembly.results[part.path].module
            put(assembly.model, part.paths, part.module)
    progress(1.0)
    for part in assembly.parts:
        if part.path in modules:
            put(assembly.model, part.paths, modules[part.path])
    return assembly.result(requested)


def apply_in_parts(
    error: CaptureError, model: Any, plan: PruningPlan, args: Any, kwargs: dict[str, Any] | None, stages: Stages, check: Callable[[str], None]
) -> PartsResult:
    """Replay a plan that was made in parts.

    Args:
        check: refuses a plan for another model, given the fingerprint of this one.

    Raises:
        CaptureError: ``error``, if submodules cannot help or none can be pruned.
        PlanError: the plan is for another model, or names weights outside of the parts found here.
    """
    _check_can_help(error, model)
    check(_fingerprint(dict(model.named_parameters(remove_duplicate=False))))
    assembly = _Assembly(error, model, args, kwargs, stages, None)
    owned = [_part_of(plan, part.path) for part in assembly.parts]
    if sum(len(own.groups) for own in owned) != len(plan.groups):
        known = {f"{part.path}.{group.name}" for part, own in zip(assembly.parts, owned, strict=True) for group in own.groups}
        stray = next(group.name for group in plan.groups if group.name not in known)
        raise PlanError(f"group '{stray}' of the plan is in no part that was captured here; use the example inputs that the plan was made with")
    for part, own in zip(assembly.parts, owned, strict=True):
        if own.groups and not assembly.place(part, Decision(plans.gone_of(own, part.analysis)), []):
            raise PlanError(f"part '{part.path}' of the plan cannot be put back: {assembly.left[part.path]}")
    return assembly.result(None)


def _fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """The fingerprint of a model; sparse weights, which no part holds, do not enter."""
    return plans.fingerprint({name: tensor for name, tensor in parameters.items() if tensor.layout == torch.strided})


def _check_can_help(error: CaptureError, model: Any) -> None:
    """Submodules help where the exporter failed on the code of a model whose weights are there."""
    if error.__cause__ is None or not isinstance(model, nn.Module):
        raise error
    tensors = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(tensor) or tensor.device.type == "meta" for tensor in tensors):
        raise error


def _copy(model: nn.Module, error: CaptureError) -> nn.Module:
    """A copy that shares no storage. Python cannot copy weights that a hook computes, and sparse ones; those are cloned."""
    computed = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf]
    clones: dict[int, Any] = {id(value): value.detach().clone() for value in computed}
    for parameter in model.parameters():
        if parameter.layout != torch.strided:
            clones[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    try:
        return copy.deepcopy(model, clones)
    except Exception as failure:
        raise CaptureError(f"{error} It cannot be pruned by its submodules either, because it cannot be copied: {first_line(failure)}") from failure


def _user_batches(calibration: Iterable[Any] | None, device: torch.device | None) -> list[Call]:
    batches = []
    for index, (args, kwargs) in enumerate(calibration_calls(calibration)):
        call = Call(args, kwargs)
        if device is not None:
            call = call.map(lambda tensor: tensor.to(device))
        for tensor in call.tensors():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CalibrationError(f"calibration batch {index} holds values that are not finite; remove or repair them")
        batches.append(call)
    return batches


def _recorded(model: nn.Module, module: nn.Module, batches: list[Call]) -> list[Call]:
    """The calls that one submodule gets while the model runs on the batches."""
    calls: list[Call] = []
    for index, batch in enumerate(batches):
        try:
            with rewound(model), watching([module], lambda _, call: calls.append(call.held())):
                batch.run(model)
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            raise CalibrationError(
                f"calibration batch {index} fails in the model: {type(failure).__name__}: {first_line(failure)}; a batch is a tensor, a tuple of positional "
                "arguments or a dict of keyword arguments, so a model that takes a list takes it as (list,)"
            ) from failure
    return calls


def _inputs(part: Part, calls: list[Call]) -> tuple[list[list[Any]], str | None]:
    """The graph inputs of the calls that bring any data, or why there are none."""
    flat = []
    for call in calls:
        if any(not tensor.numel() for tensor in call.tensors()):
            continue
        misfit = why_unfit(part.program, call)
        if misfit:
            return [], f"a call on the calibration data does not fit its graph: {misfit}"
        flat.append(part.program.flat_inputs(call.args, call.kwargs))
    return flat, None


def _renamed(path: str, plan: PruningPlan) -> PruningPlan:
    """The plan of a part in the names of the whole model."""
    return _mapped(plan, lambda name: f"{path}.{name}")


def _line_within(path: str, line: Line) -> Line:
    """The line of a part's report in the names of the whole model."""
    producers, consumers = (tuple((f"{path}.{name}", dim) for name, dim in members) for members in (line.producers, line.consumers))
    return replace(line, name=f"{path}.{line.name}", producers=producers, consumers=consumers)


def _part_of(plan: PruningPlan, path: str) -> PruningPlan:
    """The groups of a whole plan that lie in a part, in the names of the part."""
    start = f"{path}."
    groups = tuple(group for group in plan.groups if group.name.startswith(start))
    return _mapped(replace(plan, groups=groups, splits=(), folds=()), lambda name: name.removeprefix(start))


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
    splits = tuple(replace(split, name=change(split.name), source=change(split.source)) for split in plan.splits)
    folds = tuple(replace(weight, name=change(weight.name), sources=tuple(map(change, weight.sources))) for weight in plan.folds)
    return replace(plan, groups=groups, splits=splits, folds=folds)


__all__ = ["PartsResult", "Stages", "apply_in_parts", "prune_in_parts"]
