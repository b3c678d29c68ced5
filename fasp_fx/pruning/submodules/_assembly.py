"""Put pruned parts together: a copy of the model in which they take the places of the submodules that were
captured.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...analysis.plan import PruningPlan
from ...analysis.resources import Sparsity
from ...base._device import device_named
from ...base._tolerable import tolerable
from ...base._warn import warn
from ...calibration.observe._visit import Decision
from ...capturing._transformers import is_transformers, register_caches
from ...capturing._unchanged import noting_reads, rewound, said_of_reads
from ...capturing.calling._signature import CallSignature
from ...errors import CaptureError, FaspError, VerificationError, VerificationWarning, first_line
from .._pipeline import rewrite
from .._result import Result
from ..config import PruningConfig
from ..report import Report, weight_size
from ._budget import JoinedSparsity
from ._calls import Call
from ._names import line_within, plan_within
from ._result import PartsResult
from ._stand_in import dressed, put, replaced
from ._submodules import Part, Search
from ._whole import copied, whole_fingerprint


class Assembly:
    """A copy of the model in which the parts are exchanged one by one."""

    def __init__(
        self,
        error: CaptureError,
        model: Any,
        args: Any,
        kwargs: dict[str, Any] | None,
        config: PruningConfig,
        device: torch.device | str | None,
    ) -> None:
        self.error, self.seconds = error, dict[str, float]()
        call = Call(args if isinstance(args, tuple) else (args,), dict(kwargs or {}))
        self.signature = CallSignature.of(model.forward, call.args, call.kwargs)
        self.before = dict(model.named_parameters(remove_duplicate=False))
        self.device = None if device is None else device_named(device)
        try:
            self.model = copied(model)
        except tolerable(Exception) as failure:
            raise CaptureError(
                f"{error} It cannot be pruned by its submodules either, because it cannot be copied:"
                f" {first_line(failure)}"
            ) from failure
        for module in self.model.modules():
            if is_transformers(module):
                register_caches(module)  # before calls are recorded, so that what they hold is copied
        self.call = call
        if self.device is not None:
            self.model, self.call = (
                self.model.to(self.device),
                call.map(lambda tensor: tensor.to(self.device)),
            )
        with self.timed("capture"):
            search = Search(self.model, self.call, config)
            try:
                # what a model compiles for itself would not be run
                compiled = torch.compiler.set_stance("force_eager")
                with rewound(model), rewound(self.model), compiled, noting_reads(model, self.model) as read:
                    self.call.run(self.model)
                if read:
                    said = said_of_reads(model, read)
                    raise CaptureError(f"{error} It cannot be pruned by its submodules either: {said}.")
                self.parts = search.run()
            except FaspError:
                raise
            except tolerable(Exception) as failure:
                raise CaptureError(
                    f"{error} It cannot be pruned by its submodules either, because it does not run on the"
                    f" example inputs: {type(failure).__name__}: {first_line(failure)}"
                ) from failure
        self.left = search.left
        if not self.parts:
            reasons = "; ".join(f"'{path}': {reason}" for path, reason in self.left.items())
            raise CaptureError(
                f"{error} No submodule can be pruned by itself either{f': {reasons}' if reasons else ''}."
            ) from error.__cause__
        self.counted = JoinedSparsity({part.paths: Sparsity(part.analysis) for part in self.parts})
        self.results: dict[str, Result] = {}
        self.unsound: dict[str, str] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._spend(stage, time.perf_counter() - start)

    def _spend(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def place(self, part: Part, decision: Decision, calls: list[Call]) -> bool:
        """Prune a part and put it in its place; if nothing of it can go, or the model does not run with it,
        the part stays whole.
        """
        try:
            result = rewrite(part.program, part.analysis, decision)
        except tolerable(VerificationError) as failure:
            self.unsound[part.path] = self.left[part.path] = first_line(failure)
            warn(f"part '{part.path}' stays whole: {first_line(failure)}", VerificationWarning)
            return False
        for stage in ("passes", "export", "check"):
            self._spend(stage, result.report.seconds.get(stage, 0.0))
        module = dressed(result.module, part.module)  # in place, so that the result of the part holds it
        try:
            with replaced(self.model, part.paths, part.module, module), rewound(self.model):
                for call in {call.key(): call for call in calls}.values():
                    with rewound(module):
                        call.run(module)
                self.call.run(self.model)
        except tolerable(Exception) as failure:
            self.left[part.path] = (
                f"the model does not run with the smaller part in its place: {type(failure).__name__}:"
                f" {first_line(failure)}"
            )
            return False
        put(self.model, part.paths, module)
        self.results[part.path] = result
        return True

    def result(self, config: PruningConfig | None, notes: Iterable[str] = ()) -> PartsResult:
        """Everything put together.

        Args:
            notes: what there is to say of all parts together.

        Raises:
            VerificationError: nothing is left of what was decided.
        """
        if self.unsound and not self.results:
            raise VerificationError(
                "; ".join(f"part '{path}': {reason}" for path, reason in self.unsound.items())
            )
        sparsities = [
            self.results[part.path].plan.sparsity if part.path in self.results else 0.0 for part in self.parts
        ]
        reached = self.counted.average(sparsities)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        renamed = [plan_within(path, result.plan) for path, result in self.results.items()]
        plan = PruningPlan(
            whole_fingerprint(self.before),
            tuple(group for own in renamed for group in own.groups),
            reached,
            tuple(split for own in renamed for split in own.splits),
            whole_fingerprint(parameters),
            granularity=tuple(sorted(self.parts[0].analysis.granularity)),
            include=tuple(sorted(self.parts[0].analysis.include)),
            folds=tuple(weight for own in renamed for weight in own.folds),
            copies=tuple(copied for own in renamed for copied in own.copies),
            fixed=tuple(buffer for own in renamed for buffer in own.fixed),
        )
        old, new = weight_size(self.before), weight_size(parameters)
        lines = tuple(
            line_within(path, line) for path, result in self.results.items() for line in result.report.lines
        )
        without_rule = sum(
            (Counter(result.report.without_rule) for result in self.results.values()), Counter[str]()
        )
        sizes = (old[0], new[0]), (old[1], new[1])
        requested = None if config is None else config.requested
        report = Report(
            reached,
            requested,
            *sizes,
            lines,
            dict(self.seconds),
            (*self._notes(), *notes),
            without_rule=dict(without_rule),
            include=plan.include,
            config=config,
        )
        return PartsResult(self.model, plan, report, self.signature, self.results, self.left)

    def _notes(self) -> Iterator[str]:
        reason = first_line(self.error.__cause__ or self.error)
        yield f"pruned in parts, because the model cannot be captured as a whole: {reason}"
        for part in self.parts:
            if part.path in self.results:
                others = f", also at {', '.join(map(repr, part.paths[1:]))}" if len(part.paths) > 1 else ""
                yield (
                    f"part '{part.path}' ({part.calls} {'call' if part.calls == 1 else 'calls'} seen{others})"
                )
        for path, why in self.left.items():
            inside = any(other.startswith(f"{path}.") for other in self.results)
            yield (
                f"'{path}' is pruned only by its submodules: {why}"
                if inside
                else f"left '{path}' whole: {why}"
            )
        notes = [(path, note) for path, result in self.results.items() for note in result.report.notes]
        for note, count in Counter(note for _, note in notes).items():
            paths = [path for path, other in notes if other == note]
            yield f"in '{paths[0]}'{f' and {count - 1} more' if count > 1 else ''}: {note}"


__all__ = ["Assembly"]
