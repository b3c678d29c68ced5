"""A model that cannot be captured as a whole, pruned by the submodules that can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import chain
from operator import methodcaller
from typing import Any, cast

from torch import Tensor, fx, nn

from fasp_fx.allocation import Cap, Latency, counted
from fasp_fx.analysis import Analysis, Group, PruningPlan, Resource, Sparsity, check_fingerprint
from fasp_fx.base import tolerable, warn
from fasp_fx.calibration import Decision, ModelTrial, ServedTrial, as_calls, check_inputs
from fasp_fx.capturing import rewound
from fasp_fx.errors import (
    CalibrationError,
    CallError,
    PlanError,
    VerificationError,
    VerificationWarning,
    first_line,
)

from ._config import PruningConfig
from ._report import Report, spent, weight_size, with_exclusions
from ._result import Result
from ._subject import Subject, analyze_for, rewrite
from ._submodules import Call, CapturedParts, copied, dressed, put, watching, whole_fingerprint

# --- Plans and reports in the names of the whole model.


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


def renamed(held: Any, change: Callable[[str], str], is_name: bool = False) -> Any:
    """A plan, or a line of a report, with other names of groups and weights."""
    if is_dataclass(held) and not isinstance(held, type):
        names = [own.name for own in fields(held)]
        return replace(held, **{own: renamed(getattr(held, own), change, own in _NAMES) for own in names})
    if isinstance(held, tuple):
        return tuple(renamed(one, change, is_name) for one in held)
    return change(held) if is_name and isinstance(held, str) else held


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
        self.parts = {part.paths[0]: part for part in captured.parts}
        self.originals = {path: self.model.get_submodule(path) for path in self.parts}
        self.before = self._parameters()
        self.left, self.results = dict(captured.left), dict[str, Result]()
        self._failure: VerificationError | None = None

    def analyze(self, asked: PruningConfig) -> Analysis:
        found = {path: analyze_for(part.program, asked) for path, part in self.parts.items()}
        self.analyses = {path: own for path, own in found.items() if own.chosen} or found
        for path in [path for path in found if path not in self.analyses]:
            reasons = sorted({group.reason for group in found[path].groups if group.reason})[:3]
            self.left[path] = f"nothing in it can be pruned: {'; '.join(reasons) or 'no weights are coupled'}"
        groups = [
            group_within(self.parts[path].paths, group)
            for path, own in self.analyses.items()
            for group in own.groups
        ]
        self.whole = PartsAnalysis(self.analyses, self.left, groups)
        return self.whole

    def fingerprint(self) -> str:
        fixed = {
            f"{path}.{name}": tensor
            for path, program in self.programs.items()
            for name, tensor in program.fixed().items()
        }
        return whole_fingerprint({**self.before, **fixed})

    def count(self, cap: Cap | None) -> Resource:
        if isinstance(cap, Latency):  # a function of all widths
            return cap.resource(self.whole)
        times = [self.parts[path].calls if cap is not None and cap.per_call else 1 for path in self.analyses]
        inside = {id(tensor) for path in self.analyses for tensor in self.originals[path].parameters()}
        around = {id(tensor): tensor for tensor in self.before.values() if id(tensor) not in inside}
        return Joined(
            self.whole.chosen,
            [counted(analysis, cap) for analysis in self.analyses.values()],
            times,
            0 if cap is None else cap.held(around.values()),
        )

    def trial(self, trials: Mapping[str, ModelTrial]) -> ServedTrial | None:
        return JoinedTrial(self, trials) if trials else None

    def read(self, calibration: Iterable[Any] | None) -> list[Call]:
        device = next((tensor.device for tensor in self.captured.call.tensors()), None)
        batches = [Call(args, kwargs).to(device) for args, kwargs in as_calls(calibration)]
        self._found(self.analyses, batches, keep=False)
        if not self.served():
            path = next(iter(self.analyses))
            raise CalibrationError(f"the calibration data serve no part: of '{path}', {self.left[path]}")
        return batches

    def served(self) -> list[str]:
        return [path for path in self.analyses if path not in self.left]

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
            if path in unfit or not found[path]:
                self.left[path] = unfit.get(path, "the calibration data never reaches it")
                found[path].clear()
        return found

    def apart(self, plan: PruningPlan) -> dict[str, PruningPlan]:
        """As for a whole model; of the parts that lose nothing, nothing."""
        check_fingerprint(plan, whole_fingerprint(self.before))
        found, left = {}, len(plan.groups)
        for path in self.analyses:
            groups = tuple(group for group in plan.groups if group.name.startswith(f"{path}."))
            left -= len(groups)
            if groups:
                own = replace(plan, groups=groups, splits=(), folds=(), fixed=())
                found[path] = renamed(own, methodcaller("removeprefix", f"{path}."))
        if left:
            raise PlanError(
                f"{left} groups of the plan are in no part that was captured here; use the example inputs"
                " that the plan was made with"
            )
        return found

    def put(self, path: str, decision: Decision, config: PruningConfig | None) -> None:
        """If nothing of a part can go, it stays whole.

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
        put(self.model, self.parts[path].paths, dressed(result.module, self.originals[path]))
        self.results[path] = result

    def result(self, config: PruningConfig | None) -> Result:
        """Everything put together.

        Raises:
            VerificationError: nothing is left of what was decided.
        """
        if self._failure is not None and not self.results:
            raise self._failure
        for path in [path for path in self.analyses if path not in self.results]:
            self.left.setdefault(path, "what was asked for takes nothing from it")
        named = [
            (renamed(own.plan, f"{path}.".__add__), renamed(own.report.lines, f"{path}.".__add__))
            for path, own in self.results.items()
        ]
        plan = PruningPlan(
            whole_fingerprint(self.before),
            tuple(chain.from_iterable(plan.groups for plan, _ in named)),
            0.0,
            tuple(chain.from_iterable(plan.splits for plan, _ in named)),
            whole_fingerprint(self._parameters()),
            granularity=tuple(sorted(self.whole.granularity)),
            include=tuple(sorted(self.whole.include)),
            folds=tuple(chain.from_iterable(plan.folds for plan, _ in named)),
            fixed=tuple(chain.from_iterable(plan.fixed for plan, _ in named)),
        )
        removed = {group.name: group.removed_sets for group in plan.groups}
        lost = [removed.get(group.name, 0) for group in self.whole.chosen]
        plan = replace(plan, sparsity=self.count(None).removed(lost))
        old, new = weight_size(self.before), weight_size(self._parameters())
        rules = sum((Counter(own.report.without_rule) for own in self.results.values()), Counter[str]())
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
        module = cast(fx.GraphModule, self.model)
        return Result(module, plan, report, self.captured.signature, self.results, self.left)

    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def _remarks(self) -> Iterator[str]:
        reason = first_line(self.captured.error.__cause__ or self.captured.error)
        yield f"pruned in parts, because the model cannot be captured as a whole: {reason}"
        yield from (f"'{path}' is no part: {why}" for path, why in self.left.items())
        for path, result in self.results.items():
            yield from (f"in '{path}': {note}" for note in result.report.notes)


class JoinedTrial(ServedTrial):
    """The trials of several parts as one: their losses are added up, each of its own outputs."""

    def __init__(self, subject: InParts, trials: Mapping[str, ModelTrial]) -> None:
        one = next(iter(trials.values()))
        count = min(trial.count for trial in trials.values())
        super().__init__(count, f"{one.fitness.description} of all parts together", subject.whole.chosen)
        self._subject, self._trials = subject, trials

    def losses(self, lost: Sequence[int], sequences: Sequence[int]) -> list[float]:
        shares = self._subject.split(self.taken(lost))
        found = [trial.losses(shares[path], sequences) for path, trial in self._trials.items()]
        return [sum(own) for own in zip(*found, strict=True)]


__all__ = ["InParts", "Joined", "PartsAnalysis"]
