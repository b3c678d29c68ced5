"""What is pruned: the programs that a model was captured as, by path (``""`` is the model itself), of a whole
model or of the submodules of one that cannot be captured as a whole; and how one becomes smaller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import chain
from operator import methodcaller
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fasp_fx.allocation import Cap, Latency, counted
from fasp_fx.analysis import (
    Analysis,
    Group,
    Groups,
    PruningPlan,
    Resource,
    Sparsity,
    analyze_program,
    check_structure,
    computed_fingerprint,
    fixed_of,
    planned,
    program_fingerprint,
    shapes_of,
)
from fasp_fx.base import device_named, fingerprint, tolerable, warn
from fasp_fx.calibration import (
    Batches,
    Candidates,
    Decision,
    ModelTrial,
    all_of,
    as_calls,
    check_inputs,
    read_batches,
)
from fasp_fx.capturing import Call, Parts, Program, replace_submodule, rewound, watching, with_attributes_of
from fasp_fx.errors import (
    ArgumentError,
    CalibrationError,
    CallError,
    PlanError,
    VerificationError,
    VerificationWarning,
    first_line,
)
from fasp_fx.passes import split_fused

from ._config import PruningConfig
from ._report import Prediction, Report, make_report, spent, weight_size, with_exclusions
from ._result import Result
from .check import Checker


def check_weights(programs: Iterable[Program]) -> None:
    """Refuse weights without values.

    Raises:
        ArgumentError: names one.
    """
    empty = (
        name
        for program in programs
        for name, tensor in program.weights().items()
        if tensor.device.type == "meta"
    )
    for name in empty:
        raise ArgumentError(
            f"'{name}' is on the meta device and has no values; analyze() works without weights, prune()"
            " needs them"
        )


def split(analyses: Mapping[str, Analysis], lost: Sequence[int]) -> dict[str, list[int]]:
    """What the groups of each of some programs lose, of what all groups do."""
    counts = iter(lost)
    return {path: [next(counts) for _ in part.chosen] for path, part in analyses.items()}


class Whole:
    """A model on its way to a smaller one, captured as one program.

    Args:
        program: that.
        device: where batches are moved.

    Attributes:
        programs: what it was captured as, by path, in the order in which the model runs them.
        analyses: those of the programs that are pruned, once :meth:`analyze` was called.
        notes: what there is to say of all programs together.
        prediction: what losing channels will cost, once it was decided which.
    """

    def __init__(self, program: Program, device: torch.device | str | None = None) -> None:
        self.programs, self._device = {"": program}, None if device is None else device_named(device)
        self.analyses: dict[str, Analysis] = {}
        self.notes: list[str] = []
        self.prediction: Prediction | None = None

    def analyze(self, asked: PruningConfig) -> Analysis:
        """The groups of all programs, in the names of the model."""
        self.analyses = {"": analyze_for(self.programs[""], asked)}
        return self.analyses[""]

    def fingerprint(self) -> str:
        """What tells the model, with its weights, from others."""
        return computed_fingerprint(self.programs[""])

    def count(self, cap: Cap | None) -> Resource:
        """What a budget counts, of all programs together; ``None``: what sparsity is a fraction of."""
        return counted(self.analyses[""], cap)

    def apart(self, plan: PruningPlan) -> dict[str, PruningPlan]:
        """What a plan says of each program that loses anything, in the program's names.

        Raises:
            PlanError: the plan is for another model.
        """
        self.notes = check_structure(plan, self.programs[""].parameters())
        return {"": plan}

    def read(self, calibration: Iterable[Any] | None) -> Any:
        """The calibration batches, each of its tensors and constants.

        Raises:
            CalibrationError: one does not fit.
        """
        return read_batches(self.programs[""], calibration, self._device)

    def served(self) -> list[str]:
        """The programs that the batches serve, once :meth:`read` was called."""
        return [""]

    def inputs(self, path: str, batches: Any) -> Any:
        """What the batches bring to the inputs of a program's graph, behind the programs that were put; none
        where the program has to stay as it is.
        """
        return batches

    def trial(self, trials: Mapping[str, ModelTrial]) -> Candidates | None:
        """What runs the programs as they would be pruned, if anything does."""
        return trials.get("")

    def put(self, path: str, decision: Decision, config: PruningConfig | None) -> None:
        """Carry out what was decided for a program, and put what comes of it into the program's place."""
        self._result = rewrite(self.programs[""], self.analyses[""], decision, config)

    def result(self, config: PruningConfig | None) -> Result:
        """The smaller model, once all programs were put."""
        return self._result


def analyze_for(program: Program, asked: PruningConfig | PruningPlan) -> Analysis:
    """The groups of a program at the granularities that are asked for, or that a plan was made with; fused
    weights are taken apart where they have to be.
    """
    return analyze_program(program, split_fused, asked.granularity, asked.include)


def make_plan(
    program: Program, analysis: Analysis, decision: Decision, result: str | None = None
) -> PruningPlan:
    """What was decided, as data; ``result`` is the fingerprint of what came of it."""
    entries = planned(analysis.chosen, decision.gone, analysis)
    groups = tuple(entry for entry in entries if entry.removed_sets)
    return PruningPlan(
        program_fingerprint(program),
        groups,
        Sparsity(analysis).removed([entry.removed_sets for entry in entries]),
        tuple(analysis.program.parts.values()) if groups else (),
        result,
        granularity=tuple(sorted(analysis.granularity)),
        include=tuple(sorted(analysis.include)),
        folds=program.folds,
        fixed=fixed_of(program),
        shapes=shapes_of(program.parameters()),
    )


def rewrite(
    program: Program,
    analysis: Analysis,
    decision: Decision,
    config: PruningConfig | None = None,
    whole: bool = False,
) -> Result:
    """Take out of a program what was decided for its analysis, hold the result against the masked dense
    program, and report it.

    Args:
        config: what was asked for; ``None`` where a plan is replayed, or for a part of a model.
        whole: raise where not all of what was decided holds, rather than leave some groups whole.

    Raises:
        VerificationError: nothing of what was decided holds.
    """
    checked = Checker(program, analysis, decision).run(whole)
    weights = dict(checked.module.named_parameters(remove_duplicate=False))
    plan = make_plan(program, analysis, checked.decision, fingerprint(weights))
    return Result(
        checked.module,
        plan,
        make_report(analysis, plan, checked, program.parameters(), weights, config),
        program.signature,
    )


# --- A model that cannot be captured as a whole: plans and reports in its names.


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


#: fields of plans and reports that hold names of groups or weights
_NAMES = frozenset({"name", "source", "sources", "producers", "consumers"})


def renamed(value: Any, change: Callable[[str], str], is_name: bool = False) -> Any:
    """A plan, or a line of a report, with other names of groups and weights."""
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **{name: renamed(part, change, name in _NAMES) for name, part in parts.items()})
    if isinstance(value, tuple):
        return tuple(renamed(item, change, is_name) for item in value)
    return change(value) if is_name and isinstance(value, str) else value


# --- What is counted, and known, of all parts together.


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
        counts, pairs = iter(lost), zip(self._parts, self._times, strict=True)
        used = (times * part.used([next(counts) for _ in part.groups]) for part, times in pairs)
        return sum(used, self._around)


class PartsAnalysis(Groups):
    """What :func:`fasp_fx.analyze` returns for a model that cannot be captured as a whole.

    Attributes:
        parts: the analysis of each captured submodule, by its path; the names in them are those of the
            submodule.
        left: for each submodule that stays whole, why.
        groups: the groups of all parts in the order in which the model calls them, in the names of the whole
            model.
    """

    def __init__(
        self, parts: Mapping[str, Analysis], left: Mapping[str, str], groups: Sequence[Group]
    ) -> None:
        self.parts, self.left, self.groups = dict(parts), dict(left), list(groups)
        one = next(iter(parts.values()))
        self.granularity, self.include = one.granularity, one.include

    @property
    def max_sparsity(self) -> float:
        """The highest sparsity of all parts together that can be asked for with ``round_to=1``."""
        resources = [*map(Sparsity, self.parts.values())]
        return Joined(self.chosen, resources, [1] * len(resources), 0).reach(1)

    def explain(self, first: str, second: str | None = None) -> list[str]:
        """As :meth:`fasp_fx.Analysis.explain`, of weights of one part in the names of the whole model.

        Raises:
            ArgumentError: they are in no part together, or not coupled there.
        """
        groups = [str(group) for group in self.groups if first in group.names]
        if second is None and groups:
            return groups
        for path, analysis in self.parts.items():
            inside = f"{path}."
            if second is not None and first.startswith(inside) and second.startswith(inside):
                lines = analysis.explain(first.removeprefix(inside), second.removeprefix(inside))
                return [line if " = " in line else f"{inside}{line}" for line in lines]
        raise ArgumentError(
            f"'{first}' and '{second or first}' are in no part together that was captured"
            f" ({', '.join(self.parts)})"
        )


def strided(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters but for sparse ones, which no part holds."""
    return {name: tensor for name, tensor in parameters.items() if tensor.layout == torch.strided}


def whole_fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """The fingerprint of a model."""
    return fingerprint(strided(parameters))


class InParts:
    """A model that is pruned in parts: each is exchanged for a smaller one while the others wait.

    Args:
        around: the model, with what was captured of it.
        model: the model itself where nobody else has it, so that it may become the result, or else a copy.
    """

    def __init__(self, around: Parts, model: nn.Module) -> None:
        self.programs = {part.paths[0]: part.program for part in around.parts}
        self.analyses: dict[str, Analysis] = {}
        self.notes: list[str] = []
        self.prediction: Prediction | None = None
        self.around, self.model = around, model
        self.parts = {part.paths[0]: part for part in around.parts}
        self.originals = {path: self.model.get_submodule(path) for path in self.parts}
        self.before = self._parameters()
        self.left, self.results = dict(around.left), dict[str, Result]()
        self._failure: VerificationError | None = None

    def analyze(self, asked: PruningConfig) -> PartsAnalysis:
        """As :meth:`Whole.analyze`."""
        each = {path: analyze_for(part.program, asked) for path, part in self.parts.items()}
        self.analyses = {path: analysis for path, analysis in each.items() if analysis.chosen} or each
        for path in [path for path in each if path not in self.analyses]:
            reasons = sorted({group.reason for group in each[path].groups if group.reason})[:3]
            self.left[path] = f"nothing in it can be pruned: {'; '.join(reasons) or 'no weights are coupled'}"
        groups = [
            group_within(self.parts[path].paths, group)
            for path, analysis in self.analyses.items()
            for group in analysis.groups
        ]
        self.whole = PartsAnalysis(self.analyses, self.left, groups)
        return self.whole

    def fingerprint(self) -> str:
        """As :meth:`Whole.fingerprint`."""
        fixed = {
            f"{path}.{name}": tensor
            for path, program in self.programs.items()
            for name, tensor in program.fixed().items()
        }
        return whole_fingerprint({**self.before, **fixed})

    def count(self, cap: Cap | None) -> Resource:
        """As :meth:`Whole.count`."""
        if isinstance(cap, Latency):  # a function of all widths
            return cap.of(self.whole.chosen)
        times = [self.parts[path].calls if cap is not None and cap.per_call else 1 for path in self.analyses]
        inside = {id(tensor) for path in self.analyses for tensor in self.originals[path].parameters()}
        around = {id(tensor): tensor for tensor in self.before.values() if id(tensor) not in inside}
        return Joined(
            self.whole.chosen,
            [counted(analysis, cap) for analysis in self.analyses.values()],
            times,
            0 if cap is None else cap.held(around.values()),
        )

    def trial(self, trials: Mapping[str, ModelTrial]) -> Candidates | None:
        """As :meth:`Whole.trial`."""
        return JoinedTrial(self, trials) if trials else None

    def read(self, calibration: Iterable[Any] | None) -> Batches:
        """As :meth:`Whole.read`."""
        device = next((tensor.device for tensor in self.around.call.tensors()), None)
        data = all_of(calibration)
        batches = Batches([Call(*each).to(device) for each in as_calls(data)], data.sources)
        self._calls(self.analyses, batches, lambda flat: [])
        if not self.served():
            path = next(iter(self.analyses))
            raise CalibrationError(f"the calibration data serve no part: of '{path}', {self.left[path]}")
        return batches

    def served(self) -> list[str]:
        """As :meth:`Whole.served`."""
        return [path for path in self.analyses if path not in self.left]

    def inputs(self, path: str, batches: Any) -> Any:
        """As :meth:`Whole.inputs`."""
        return self._calls([path], batches, list)[path]

    def _calls(
        self, paths: Iterable[str], batches: Batches, kept: Callable[[list[Any]], list[Any]]
    ) -> dict[str, Batches]:
        """What each call of some parts brings to the inputs of their graphs, while every batch runs once;
        nothing where a part does not take one of its calls.

        Args:
            kept: what is kept of a call's inputs.
        """
        modules = {self.originals[path]: path for path in paths}
        calls = {path: Batches() for path in paths}
        unfit = dict[str, str]()

        def note(module: nn.Module, call: Call) -> None:
            path = modules[module]
            if all(tensor.numel() for tensor in call.tensors()):
                try:
                    flat = self.programs[path].flat_inputs(call.args, call.kwargs)
                    check_inputs(self.programs[path], flat, "a call on the calibration data")
                    calls[path].append(kept(flat))
                    calls[path].sources.extend(batches.sources[index : index + 1])
                except tolerable(CallError, CalibrationError) as error:
                    unfit.setdefault(path, first_line(error))

        for index, batch in enumerate(batches):
            try:
                with watching(modules, note), rewound(self.model):
                    batch.run(self.model)
            except tolerable(Exception) as failure:
                raise CalibrationError(
                    f"calibration batch {index} fails in the model: {type(failure).__name__}:"
                    f" {first_line(failure)}; a batch is a tensor, a tuple of positional arguments or a dict"
                    " of keyword arguments, so a model that takes a list takes it as (list,), and one that"
                    " takes no labels is given none: calibration=(batch[0] for batch in loader)"
                ) from failure
        for path in paths:
            if path in unfit or not calls[path]:
                self.left[path] = unfit.get(path, "the calibration data never reaches it")
                calls[path] = Batches()
        return calls

    def apart(self, plan: PruningPlan) -> dict[str, PruningPlan]:
        """As :meth:`Whole.apart`."""
        self.notes = check_structure(plan, strided(self.before))
        parts, strange = {}, len(plan.groups)
        for path in self.analyses:
            groups = tuple(group for group in plan.groups if group.name.startswith(f"{path}."))
            strange -= len(groups)
            if groups:
                part = replace(plan, groups=groups, splits=(), folds=(), fixed=(), shapes=())
                parts[path] = renamed(part, methodcaller("removeprefix", f"{path}."))
        if strange:
            raise PlanError(
                f"{strange} groups of the plan are in no part that was captured here; use the example inputs"
                " that the plan was made with"
            )
        return parts

    def put(self, path: str, decision: Decision, config: PruningConfig | None) -> None:
        """As :meth:`Whole.put`; if nothing of a part can go, it stays whole.

        Raises:
            PlanError: it does, and a plan is replayed (``config=None``).
        """
        try:
            result = rewrite(self.programs[path], self.analyses[path], decision)
        except tolerable(VerificationError) as failure:
            if config is None:
                raise PlanError(f"part '{path}' of the plan cannot be put back: {failure}") from failure
            self.left[path], self._failure = first_line(failure), failure
            warn(f"part '{path}' stays whole: {first_line(failure)}", VerificationWarning)
            return
        replace_submodule(
            self.model, self.parts[path].paths, with_attributes_of(result.module, self.originals[path])
        )
        self.results[path] = result

    def result(self, config: PruningConfig | None) -> Result:
        """As :meth:`Whole.result`.

        Raises:
            VerificationError: nothing is left of what was decided.
        """
        if self._failure is not None and not self.results:
            raise self._failure
        for path in [path for path in self.analyses if path not in self.results]:
            self.left.setdefault(path, "what was asked for takes nothing from it")
        named = [
            (renamed(part.plan, f"{path}.".__add__), renamed(part.report.lines, f"{path}.".__add__))
            for path, part in self.results.items()
        ]
        joined = {
            name: tuple(chain.from_iterable(getattr(plan, name) for plan, _ in named))
            for name in ("groups", "splits", "folds", "fixed")
        }
        removed = {group.name: group.removed_sets for group in joined["groups"]}
        plan = PruningPlan(
            whole_fingerprint(self.before),
            sparsity=self.count(None).removed([removed.get(group.name, 0) for group in self.whole.chosen]),
            result=whole_fingerprint(self._parameters()),
            granularity=tuple(sorted(self.whole.granularity)),
            include=tuple(sorted(self.whole.include)),
            shapes=shapes_of(strided(self.before)),
            **joined,
        )
        old, new = weight_size(self.before), weight_size(self._parameters())
        rules = sum((Counter(part.report.without_rule) for part in self.results.values()), Counter[str]())
        report = Report(
            plan.sparsity,
            None if config is None else config.target_sparsity,
            (old[0], new[0]),
            (old[1], new[1]),
            with_exclusions(chain(*(lines for _, lines in named)), self.whole.groups, config),
            notes=(*self._remarks(), *self.notes),
            without_rule=dict(rules),
            include=plan.include,
            budgets=tuple(spent(cap, self.count(cap), removed) for cap in config.budgets) if config else (),
            config=config,
        )
        return Result(
            cast(fx.GraphModule, self.model), plan, report, self.around.signature, self.results, self.left
        )

    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def _remarks(self) -> Iterator[str]:
        reason = first_line(self.around.error.__cause__ or self.around.error)
        yield f"pruned in parts, because the model cannot be captured as a whole: {reason}"
        yield from (f"'{path}' is no part: {why}" for path, why in self.left.items())
        for path, result in self.results.items():
            yield from (f"in '{path}': {note}" for note in result.report.notes)


class JoinedTrial:
    """The trials of several parts as one: their losses are added up, each of its own outputs."""

    def __init__(self, subject: InParts, trials: Mapping[str, ModelTrial]) -> None:
        one = next(iter(trials.values()))
        self.count = min(trial.count for trial in trials.values())
        self.description = f"{one.description} of all parts together"
        self._subject, self._trials = subject, trials

    def losses(self, lost: Sequence[int], sequences: Sequence[int]) -> list[float]:
        """As for one program, of what all groups of the model lose."""
        shares = split(self._subject.analyses, lost)
        losses = [trial.losses(shares[path], sequences) for path, trial in self._trials.items()]
        return [sum(of_parts) for of_parts in zip(*losses, strict=True)]


#: a model on its way to a smaller one
Subject = Whole | InParts
