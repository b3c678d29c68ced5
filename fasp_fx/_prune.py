"""The main job: capture, analyse, observe, choose, restore, rewrite."""

from __future__ import annotations

import difflib
import operator
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
import torch.distributed as dist

from . import plan as plans
from ._capture import capture as capture_program
from ._captured import Captured, Model, program_of
from ._chooser import Chooser
from ._exactness import carry_out
from ._observe._calibration import check_calibration, read_batches
from ._observe._consumers import Consumers
from ._observe._planned import Planned
from ._observe._ranks import Ranks
from ._observe._visit import Decision
from ._parts._prune import PARTIAL_LOSSES, Stages, analyze_in_parts, apply_in_parts, check_parts_help, prune_in_parts
from ._program import Program
from ._result import Result
from ._store._journal import open_journal
from ._store._search_state import open_search
from ._undisturbed import check_default_device, in_usual_modes, one_at_a_time
from .allocation import CostAllocation, TrialAllocation
from .analysis import Analysis, analyze_program
from .config import PruningConfig, PruningOptions
from .costs import Costs, check_costs
from .errors import ArgumentError, CaptureError, PlanError
from .passes import split_fused
from .plan import PruningPlan
from .report import cache_bytes, make_report
from .resources import Sparsity

#: the part of the progress shown that measuring costs takes, where they are measured
MEASURING = 0.35
#: the part of the rest that a search takes
SEARCHING = 0.6
#: the options that say how what stays is restored, and not what goes
_RESTORING = ("restore", "drift", "blend", "padding_mask", "precision")


@one_at_a_time
@in_usual_modes
def analyze(
    model: Model | Captured,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    state: tuple[str, ...] = (),
    granularity: Iterable[str] = ("channel",),
    include: Iterable[str] = (),
) -> Analysis:
    """Find the coupled groups of a model. Weights are not read: a model on the meta device will do.

    A model that cannot be captured whole is analysed in the parts in which :func:`prune` would prune it (docs/submodules.md): what comes back has the groups
    of all of them, and ``parts`` and ``left``. Such a model runs on the example inputs, and so needs its weights.

    Args:
        model: module in evaluation mode, graph module or exported program.
        args, kwargs: example inputs.
        dynamic_shapes: as for ``torch.export.export``; inferred if ``None``.
        state: names of arguments and outputs that may become narrower (caches are found by themselves).
        granularity, include: as for :func:`prune`; ``max_sparsity`` speaks of what they allow.

    Raises:
        ArgumentError, CaptureError: see :func:`fasp_fx.capture`.
    """
    config = PruningConfig(granularity=granularity, include=include)
    try:
        program = program_of(model, args, kwargs, dynamic_shapes=dynamic_shapes, state=state, device=None, run=False)
    except CaptureError as error:
        check_parts_help(error, model, dynamic_shapes=dynamic_shapes, state=state)
        return analyze_in_parts(error, model, args, kwargs, _stages(config))
    return analyze_program(program, split_fused, config.granularity, config.include)


@one_at_a_time
@in_usual_modes
def prune(
    model: Model | Captured,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    config: PruningConfig | None = None,
    costs: Costs | None = None,
    state: tuple[str, ...] = (),
    dynamic_shapes: Any = None,
    device: torch.device | str | None = None,
    progress: Callable[[float], None] | None = None,
    on_analysis: Callable[[Analysis], None] | None = None,
    group: dist.ProcessGroup | None = None,
    checkpoint: str | Path | None = None,
    **options: Unpack[PruningOptions],
) -> Result:
    """Make a model physically smaller; the caller's model is not touched.

    Args:
        model: module in evaluation mode, graph module or exported program; or what :func:`fasp_fx.capture` made of one.
        args, kwargs: example inputs.
        calibration: an iterable of batches: tensors, tuples of positional arguments or dicts of keyword arguments.
        config: the options; ``None``: the defaults.
        costs: cost curves that :func:`fasp_fx.measure` gave, for an allocation that wants them; ``None``: they are measured.
        state: names of arguments and outputs that may become narrower.
        dynamic_shapes: as for ``torch.export.export``; inferred if ``None``.
        device: where to capture and calibrate; batches are moved there. ``None``: the model's device.
        progress: called with the fraction of the calibration done.
        on_analysis: called with the analysis, once the sparsity or budget is known to be in reach and before the first calibration batch is asked for.
        group: processes of ``torch.distributed`` that call this together, with the same arguments: each runs some of the batches, and all get the same
            result (docs/processes.md).
        checkpoint: a folder that keeps what was decided, consumer by consumer: the same call with the same folder goes on from there, to the same result
            (docs/larger-than-memory.md).
        options: fields of :class:`fasp_fx.PruningConfig`, which describes them (``sparsity=0.2``, ``score="fasp"``, …), in the place of those of
            ``config``.

    Raises:
        ArgumentError: an option is not known, or out of range.
        SparsityError: outside (0, 1) or out of reach.
        BudgetError: a budget is out of reach, met already or cannot be counted of this model.
        CalibrationError: the calibration data does not fit.
        NothingPrunableError: no group can be pruned.
        CaptureError: see :func:`fasp_fx.capture`.
        RankError: another process of the group is gone.
        StoreError: the checkpoint is that of another run, or cannot be written.
    """
    check_default_device()
    config = PruningConfig.of(config, options)
    if config.needs_data:
        check_calibration(calibration)
    ranks, clock = Ranks(group), Timings()
    try:
        program = program_of(model, args, kwargs, dynamic_shapes=dynamic_shapes, state=state, device=device)
    except CaptureError as error:
        tried = config.allocation if isinstance(config.allocator, TrialAllocation) else None
        whole = {"budget": config.caps, "checkpoint": checkpoint, "allocation": tried} | ({} if config.loss in PARTIAL_LOSSES else {"loss": config.loss})
        check_parts_help(error, model, dynamic_shapes=dynamic_shapes, state=state, padding_mask=config.padding_mask, costs=costs is not None, **whole)
        return prune_in_parts(
            error,
            model,
            args,
            kwargs,
            _stages(config),
            Chooser(config, ranks=ranks),
            calibration=calibration,
            device=device,
            progress=progress or (lambda fraction: None),
            on_analysis=on_analysis,
        )
    analysis, decision = choose(
        program, config, calibration, device=device, progress=progress, on_analysis=on_analysis, costs=costs, ranks=ranks, checkpoint=checkpoint, clock=clock
    )
    return rewrite(program, analysis, decision, config, clock)


def choose(
    program: Program,
    config: PruningConfig,
    calibration: Iterable[Any] | None,
    *,
    device: torch.device | str | None = None,
    progress: Callable[[float], None] | None = None,
    on_analysis: Callable[[Analysis], None] | None = None,
    costs: Costs | None = None,
    loss: Literal["outputs", "next-token"] = "outputs",
    ranks: Ranks,
    checkpoint: str | Path | None,
    clock: Timings,
) -> tuple[Analysis, Decision]:
    """Analyse a captured program, calibrate it and choose what goes; see :func:`prune`.

    Args:
        loss: what ``loss="auto"`` stands for.
        ranks: the processes that share the batches.
        checkpoint: as for :func:`prune`.
    """
    _check_weights(program)
    if costs is not None:
        check_costs(costs, plans.program_fingerprint(program), config.score_name)
        if not isinstance(config.allocator, CostAllocation):
            raise ArgumentError("costs= is for an allocation by predicted losses, and this one is uniform; leave it out, or pass allocation='global'")
    clock.lap("capture")
    analysis = analyze_program(program, split_fused, config.granularity, config.include)
    chooser, consumers = Chooser(config, loss, ranks), Consumers(analysis, config.restore is not None)
    budget = chooser.budget(analysis)
    chooser.check(budget, analysis.groups, costs)
    clock.lap("analysis")
    if on_analysis is not None:
        on_analysis(analysis)
    advance = progress or (lambda fraction: None)
    batches = read_batches(program, calibration, None if device is None else torch.device(device)) if config.needs_data else None
    ranks.check_alike(plans.program_fingerprint(program), batches or (), config)
    share, state = 0.0, None
    where = None if checkpoint is None or batches is None or ranks.rank else Path(checkpoint).absolute()
    if where is not None and chooser.tries:
        state = open_search(where, plans.program_fingerprint(program), config, batches or (), ranks.size)
    if batches is not None and chooser.measures:
        share = MEASURING
        costs = chooser.measure(consumers, batches, plans.program_fingerprint(program), lambda fraction: advance(share * fraction), costs)
        clock.lap("measuring")
    done = share + SEARCHING * (1 - share) if chooser.tries else share
    lost = chooser.allocate(budget, analysis.groups, costs, lambda fraction: advance(share + (done - share) * fraction), state)
    if chooser.tries:
        clock.lap("searching")
    journal = None if where is None else open_journal(where, plans.program_fingerprint(program), config, lost, batches or (), ranks.size)
    decision = chooser.choose(consumers, lost, batches, lambda fraction: advance(done + (1 - done) * fraction), journal)
    decision.notes.extend(chooser.notes)
    if costs is not None and chooser.needs_costs:
        rise = costs.predicted(dict(zip((group.name for group in budget.groups), lost, strict=True)))
        decision.notes.append(f"predicted rise of {chooser.said_loss}: {rise:.3g}")
    if not any(lost):
        decision.notes.append("nothing goes: what was asked for is less than half a step of any group; ask for more, or for a smaller round_to")
    clock.lap("calibration")
    return analysis, decision


@one_at_a_time
@in_usual_modes
def apply(
    model: Model | Captured,
    plan: PruningPlan,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    config: PruningConfig | None = None,
    dynamic_shapes: Any = None,
    state: tuple[str, ...] = (),
    progress: Callable[[float], None] | None = None,
    **options: Unpack[PruningOptions],
) -> Result:
    """Carry out a plan on the model it was made for, whatever chose it.

    Args:
        model, args, kwargs, dynamic_shapes, state, progress: as for :func:`prune`.
        plan: says what goes.
        calibration: batches to restore on what stays; ``None``: it is left as it is.
        config, options: how to restore: ``restore``, ``drift``, ``blend``, ``padding_mask`` and ``precision`` of :class:`fasp_fx.PruningConfig`.

    Raises:
        ArgumentError: the plan is none, or an option says what goes or how to restore without data.
        PlanError: the plan is for another model (or for this one before it was pruned).
        CalibrationError: the calibration data does not fit.
    """
    if not isinstance(plan, PruningPlan):
        raise ArgumentError(f"plan is a {type(plan).__name__}; pass a PruningPlan (PruningPlan.from_json reads one that was written as text)")
    check_default_device()
    config = _restoring(config, options, plan, calibration is not None)
    clock = Timings()
    try:
        program = program_of(model, args, kwargs, dynamic_shapes=dynamic_shapes, state=state, device=None)
    except CaptureError as error:
        check_parts_help(error, model, dynamic_shapes=dynamic_shapes, state=state, calibration=calibration is not None)
        return apply_in_parts(error, model, plan, args, kwargs, _stages(config), lambda found: plans.check_fingerprint(plan, found))
    plans.check_fingerprint(plan, plans.program_fingerprint(program))
    clock.lap("capture")
    analysis = analyze_program(program, split_fused, plan.granularity, plan.include)
    gone = plans.gone_of(plan, analysis)
    clock.lap("analysis")
    if calibration is None:
        return rewrite(program, analysis, Decision(gone), None, clock)
    planned = Planned(analysis, gone)
    batches = read_batches(program, calibration, None)
    chooser = Chooser(replace(config, score=planned))
    decision = chooser.choose(Consumers(analysis, config.restore is not None), planned.lost, batches, progress or (lambda fraction: None))
    clock.lap("calibration")
    return rewrite(program, analysis, decision, None, clock)


def _restoring(config: PruningConfig | None, options: PruningOptions, plan: PruningPlan, has_data: bool) -> PruningConfig:
    """How to restore behind a plan.

    Raises:
        ArgumentError: something else was asked for, or there are no data to do it with.
    """
    asked = PruningConfig.of(config, options)
    if others := asked.beyond(_RESTORING):
        raise ArgumentError(f"the plan says what goes, so that {others[0]}= has nothing to say; leave it out")
    if not has_data and asked.beyond(()):
        raise ArgumentError("nothing is restored without data; give calibration=, or leave out how to")
    return replace(asked, granularity=plan.granularity, include=plan.include)


class Timings:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def _stages(config: PruningConfig) -> Stages:
    """What each part goes through where a model is pruned by its submodules."""
    return Stages(
        partial(capture_program, image_sizes=True, own_defaults=True),  # a part can be called with features of many sizes
        lambda program: analyze_program(program, split_fused, config.granularity, config.include),
        lambda program, analysis, decision: rewrite(program, analysis, decision, None, Timings()),
    )


def _check_weights(program: Program) -> None:
    for name, tensor in program.weights().items():
        if tensor.device.type == "meta":
            raise ArgumentError(f"'{name}' is on the meta device and has no values; analyze() works without weights, prune() needs them")


def make_plan(program: Program, analysis: Analysis, decision: Decision) -> PruningPlan:
    """What was decided, as data; its result is not known yet."""
    entries = plans.planned(analysis.chosen, decision.gone, analysis)
    groups = tuple(entry for entry in entries if entry.removed_sets)
    return PruningPlan(
        plans.program_fingerprint(program),
        groups,
        Sparsity(analysis).removed([entry.removed_sets for entry in entries]),
        tuple(plans.SplitWeight(name, part.name, part.dim, part.rows) for name, part in analysis.program.parts.items()) if groups else (),
        granularity=tuple(sorted(analysis.granularity)),
        include=tuple(sorted(analysis.include)),
        folds=program.folds,
        copies=analysis.program.copies if groups else (),
    )


def _index(position: object) -> int:
    try:
        return operator.index(position)  # type: ignore[arg-type]
    except TypeError as error:
        raise PlanError(f"{position!r} is the number of no channel set; give integers, counted from zero") from error


def plan_from_sets(
    captured: Captured, removed: Mapping[str, Iterable[int]], *, granularity: Iterable[str] = ("channel",), include: Iterable[str] = ()
) -> PruningPlan:
    """The plan that removes given channel sets, however they were chosen; :func:`apply` carries it out.

    Args:
        captured: what :func:`fasp_fx.capture` returned.
        removed: for groups by their names, which channel sets go, counted from zero (``Member.sets`` says which set an index of a weight belongs to).
        granularity, include: as for :func:`analyze`, which gives the groups.

    Raises:
        PlanError: a group is not known or cannot be pruned, or a set is not there; or the blocks of a group would lose unequal counts, or too many.
    """
    config = PruningConfig(granularity=granularity, include=include)
    analysis = analyze_program(captured.checked(), split_fused, config.granularity, config.include)
    groups = {group.name: group for group in analysis.chosen}
    gone = np.zeros(int(analysis.labels.max(initial=-1)) + 1, dtype=bool)
    for name, positions in removed.items():
        if name not in groups:
            near = difflib.get_close_matches(name, groups, 1)
            raise PlanError(f"'{name}' is no group that can be pruned{f'; did you mean {near[0]!r}?' if near else ''}; analyze(...).groups has their names")
        group, wanted = groups[name], np.unique(np.fromiter(map(_index, positions), dtype=np.int64))
        if len(wanted) and not (wanted[0] >= 0 and wanted[-1] < group.size):
            raise PlanError(f"'{name}' has the channel sets 0 to {group.size - 1}, not {wanted[0] if wanted[0] < 0 else wanted[-1]}")
        lost = {int(block): int((group.block_of[wanted] == block).sum()) for block in np.unique(group.block_of)}
        if len(set(lost.values())) > 1:
            raise PlanError(f"the {group.blocks} blocks of '{name}' must lose equally many channel sets, not {', '.join(map(str, lost.values()))}")
        if group.width - max(lost.values()) < group.needed:
            raise PlanError(f"'{name}' keeps at least {group.needed} of the {group.width} channel sets of a block; remove fewer")
        gone[group.sets[wanted]] = True
    return make_plan(captured.program, analysis, Decision(gone[analysis.labels]))


def rewrite(program: Program, analysis: Analysis, decision: Decision, config: PruningConfig | None, clock: Timings, whole: bool = False) -> Result:
    """Take out of a program what was decided for its analysis, hold the result against the masked dense program, and report it.

    Args:
        config: what was asked for; ``None`` where a plan is replayed, or for a part of a model.
        whole: raise where not all of what was decided holds, rather than leave some groups whole.

    Raises:
        VerificationError: nothing of what was decided holds.
    """
    held = carry_out(program, analysis, decision, clock.lap, whole)
    plan = make_plan(program, analysis, held.decision)
    plan = replace(plan, result=plans.fingerprint(dict(held.module.named_parameters(remove_duplicate=False))))
    report = make_report(analysis, plan, held.decision, program.parameters(), dict(held.module.named_parameters()), config, clock.seconds, held.left)
    cache = cache_bytes(program.module.graph, held.module.graph, program.state_outputs)
    report = replace(report, cache=cache, notes=(*report.notes, *held.notes))
    return Result(held.module, held.exported, plan, report, held.rewritten.signature)
