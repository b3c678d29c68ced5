"""The main job, of a model or of what was captured of one: analyse it, prune it, carry a plan out on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.distributed as dist

from ..allocation._allocation import TrialAllocation
from ..allocation.costs import Costs
from ..analysis import plan as plans
from ..analysis._analysis import Analysis
from ..analysis.plan import PruningPlan
from ..base._options import check_callable
from ..base._tolerable import tolerable
from ..base._undisturbed import check_default_device, in_usual_modes, one_at_a_time
from ..calibration.observe._calibration import check_calibration, read_batches
from ..calibration.observe._consumers import Consumers
from ..calibration.observe._order import Planned
from ..calibration.observe._ranks import Ranks, ended_together
from ..calibration.observe._visit import Decision
from ..capturing._captured import Captured, Model, program_of
from ..errors import ArgumentError, CaptureError
from ._chooser import Chooser
from ._pipeline import Timings, analyze_for, decide, rewrite
from ._result import Result
from .config import PruningConfig, PruningOptions
from .submodules._prune import (
    PARTIAL_LOSSES,
    analyze_in_parts,
    apply_in_parts,
    check_parts_help,
    prune_in_parts,
)

#: the options that say how what stays is restored, and not what goes
_RESTORING = ("restore", "drift", "padding_mask")


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

    A model that cannot be captured whole is analysed in the parts in which :func:`prune` would prune it
    (docs/submodules.md): what comes back has the groups of all of them, and ``parts`` and ``left``. Such a
    model runs on the example inputs, and so needs its weights.

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
        program = program_of(
            model, args, kwargs, dynamic_shapes=dynamic_shapes, state=state, device=None, run=False
        )
    except tolerable(CaptureError) as error:
        check_parts_help(error, model, dynamic_shapes=dynamic_shapes, state=state)
        return analyze_in_parts(error, model, args, kwargs, config)
    return analyze_for(program, config)


@one_at_a_time
@in_usual_modes
@ended_together
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
        model: module in evaluation mode, graph module or exported program; or what :func:`fasp_fx.capture`
            made of one.
        args, kwargs: example inputs.
        calibration: an iterable of batches: tensors, tuples of positional arguments or dicts of keyword
            arguments.
        config: the options; ``None``: the defaults.
        costs: cost curves that :func:`fasp_fx.measure` gave, for an allocation that wants them; ``None``:
            they are measured.
        state: names of arguments and outputs that may become narrower.
        dynamic_shapes: as for ``torch.export.export``; inferred if ``None``.
        device: where to capture and calibrate; batches are moved there. ``None``: the model's device.
        progress: called with the fraction of the calibration done.
        on_analysis: called with the analysis, once the sparsity or budget is known to be in reach and before
            the first calibration batch is asked for.
        group: processes of ``torch.distributed`` that call this together, with the same arguments: each runs
            some of the batches, and all get the same result (docs/processes.md).
        checkpoint: a folder that keeps what was decided, consumer by consumer: the same call with the same
            folder goes on from there, to the same result (docs/larger-than-memory.md).
        options: fields of :class:`fasp_fx.PruningConfig`, which describes them (``sparsity=0.2``,
            ``score="fasp"``, …), in the place of those of ``config``.

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
    check_callable(progress=progress, on_analysis=on_analysis)
    config = PruningConfig.of(config, options)
    if config.needs_data:
        check_calibration(calibration)
    ranks, clock = Ranks.of(group), Timings()
    try:
        program = program_of(model, args, kwargs, dynamic_shapes=dynamic_shapes, state=state, device=device)
    except tolerable(CaptureError) as error:
        tried = config.allocation if isinstance(config.allocator, TrialAllocation) else None
        whole = {"budget": config.caps, "checkpoint": checkpoint, "allocation": tried} | (
            {} if config.loss in PARTIAL_LOSSES else {"loss": config.loss}
        )
        check_parts_help(
            error,
            model,
            dynamic_shapes=dynamic_shapes,
            state=state,
            padding_mask=config.padding_mask,
            costs=costs is not None,
            **whole,
        )
        return prune_in_parts(
            error,
            model,
            args,
            kwargs,
            Chooser(config, ranks=ranks),
            calibration=calibration,
            device=device,
            progress=progress or (lambda fraction: None),
            on_analysis=on_analysis,
        )
    analysis, decision = decide(
        program,
        config,
        calibration,
        device=device,
        progress=progress,
        on_analysis=on_analysis,
        costs=costs,
        ranks=ranks,
        checkpoint=checkpoint,
        clock=clock,
    )
    return rewrite(program, analysis, decision, config, clock)


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
        config, options: how to restore: ``restore``, ``drift`` and ``padding_mask``
            of :class:`fasp_fx.PruningConfig`.

    Raises:
        ArgumentError: the plan is none, or an option says what goes or how to restore without data.
        PlanError: the plan is for another model (or for this one before it was pruned).
        CalibrationError: the calibration data does not fit.
    """
    if not isinstance(plan, PruningPlan):
        raise ArgumentError(
            f"plan is a {type(plan).__name__}; pass a PruningPlan (PruningPlan.from_json reads one that was"
            " written as text)"
        )
    check_default_device()
    check_callable(progress=progress)
    config = _restoring(config, options, plan, calibration is not None)
    clock = Timings()
    try:
        program = program_of(model, args, kwargs, dynamic_shapes=dynamic_shapes, state=state, device=None)
    except tolerable(CaptureError) as error:
        check_parts_help(
            error, model, dynamic_shapes=dynamic_shapes, state=state, calibration=calibration is not None
        )
        return apply_in_parts(error, model, plan, args, kwargs, config)
    plans.check_fingerprint(plan, plans.program_fingerprint(program))
    clock.lap("capture")
    analysis = analyze_for(program, plan)
    gone = plans.gone_of(plan, analysis)
    clock.lap("analysis")
    if calibration is None:
        return rewrite(program, analysis, Decision(gone), None, clock)
    planned = Planned(analysis, gone)
    batches = read_batches(program, calibration, None)
    chooser = Chooser(replace(config, score=planned))
    decision = chooser.choose(
        Consumers(analysis, config.restore is not None),
        planned.lost,
        batches,
        progress or (lambda fraction: None),
    )
    clock.lap("calibration")
    return rewrite(program, analysis, decision, None, clock)


def _restoring(
    config: PruningConfig | None, options: PruningOptions, plan: PruningPlan, has_data: bool
) -> PruningConfig:
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


__all__ = ["analyze", "apply", "prune"]
