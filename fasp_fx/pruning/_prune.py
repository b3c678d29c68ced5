"""The main job: capture a model; and of a model, or of what was captured of one: analyse it, measure it,
prune it, carry a plan out on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
import torch.distributed as dist

from ..allocation.costs import Costs
from ..analysis._analysis import Analysis
from ..analysis.groups import FROZEN, PRUNABLE
from ..analysis.plan import PruningPlan
from ..base._options import check_callable
from ..base._tolerable import tolerable
from ..base._undisturbed import in_usual_modes, one_at_a_time
from ..calibration._calibration import check_calibration
from ..calibration._ranks import Ranks, ended_together
from ..calibration._visit import Decision
from ..capturing._captured import Captured, Model, capture_whole, check_given
from ..errors import ArgumentError, CaptureError, PlanError
from ._deciding import decide, measure_subject, measuring_config, replay, restoring_config
from ._result import Result
from ._rewriting import Timings, analyze_for, make_plan
from ._subject import Subject
from .config import PruningConfig, PruningOptions
from .submodules._parts import InParts
from .submodules._submodules import CapturedParts, capture_parts, check_parts_help

#: losses that make sense for a part of a model by itself
_PARTIAL_LOSSES = ("auto", "outputs", None)


@one_at_a_time
@in_usual_modes
def capture(
    model: Model,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    *,
    state: tuple[str, ...] = (),
    dynamic_shapes: Any = None,
    device: torch.device | str | None = None,
) -> Captured:
    """Capture a model as it behaves on the example inputs, once for several prunings.

    Args:
        model: module in evaluation mode, graph module or exported program; it is not changed, and its weights
            are shared. Of one that cannot be captured as a whole, a copy is kept, with a program for each of
            the largest submodules that can (docs/submodules.md).
        args, kwargs: example inputs.
        state: names of arguments and outputs that hold state (a cache) and may become narrower.
        dynamic_shapes: as for ``torch.export.export``; inferred if ``None``.
        device: move the captured copy there; ``None`` leaves it where the model is.

    Raises:
        ArgumentError: the inputs do not fit the model.
        CaptureError: the model is in training mode, or neither it nor any of its submodules can be captured.
    """
    return _captured(model, args, kwargs, None, state=state, dynamic_shapes=dynamic_shapes, device=device)


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
    how: dict[str, Any] = {"state": state, "dynamic_shapes": dynamic_shapes, "device": None}
    return _subject_of(model, args, kwargs, run=False, **how).analyze(config)


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
    check_callable(progress=progress, on_analysis=on_analysis)
    config = PruningConfig.of(config, options)
    if config.needs_data:
        check_calibration(calibration)
    ranks, clock = Ranks.of(group), Timings()
    subject = _subject_of(
        model, args, kwargs, config, state=state, dynamic_shapes=dynamic_shapes, device=device
    )
    for path, decision in decide(
        subject,
        config,
        calibration,
        progress=progress,
        on_analysis=on_analysis,
        costs=costs,
        ranks=ranks,
        checkpoint=checkpoint,
        clock=clock,
    ):
        subject.put(path, decision, config, clock)
    return subject.result(config, clock)


@one_at_a_time
@in_usual_modes
@ended_together
def measure(
    model: Model | Captured,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    *,
    calibration: Iterable[Any],
    config: PruningConfig | None = None,
    state: tuple[str, ...] = (),
    dynamic_shapes: Any = None,
    device: torch.device | str | None = None,
    progress: Callable[[float], None] | None = None,
    group: dist.ProcessGroup | None = None,
    **options: Unpack[PruningOptions],
) -> Costs:
    """Predict what each coupled group costs, channel set by channel set.

    The dense model runs on the batches, forward and, unless ``loss=None``, back. The curves serve
    :func:`fasp_fx.prune` for any number of sparsities and budgets, with the same ``score``, ``granularity``
    and ``include``.

    Args:
        model, args, kwargs, state, dynamic_shapes, device: as for :func:`fasp_fx.prune`.
        calibration: an iterable of batches; all of them are run, and what autograd keeps of one has to fit
            the device. Some thousand tokens do.
        config, options: as for :func:`fasp_fx.prune`; ``score``, ``loss``, ``granularity`` and ``include``
            count.
        progress: called with the fraction of the batches done.
        group: as for :func:`fasp_fx.prune`.

    Raises:
        ArgumentError: an option is not known or out of range.
        CalibrationError: the batches do not fit, the loss fails or does not depend on the weights, or its
            gradients vanish or are not finite.
        CaptureError: see :func:`fasp_fx.capture`.
    """
    check_callable(progress=progress)
    asked = measuring_config(PruningConfig.of(config, options))
    check_calibration(calibration)
    subject = _subject_of(
        model, args, kwargs, asked, state=state, dynamic_shapes=dynamic_shapes, device=device
    )
    return measure_subject(subject, asked, calibration, ranks=Ranks.of(group), progress=progress)


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
    device: torch.device | str | None = None,
    progress: Callable[[float], None] | None = None,
    **options: Unpack[PruningOptions],
) -> Result:
    """Carry out a plan on the model it was made for, whatever chose it.

    Args:
        model, args, kwargs, dynamic_shapes, state, device, progress: as for :func:`prune`.
        plan: says what goes.
        calibration: batches to restore on what stays; ``None``: it is left as it is.
        config, options: how to restore: ``restore`` and ``drift`` of :class:`fasp_fx.PruningConfig`.

    Raises:
        ArgumentError: the plan is none, or an option says what goes or how to restore without data.
        PlanError: the plan is for another model (or for this one before it was pruned).
        CalibrationError: the calibration data does not fit.
    """
    check_callable(progress=progress)
    config = restoring_config(PruningConfig.of(config, options), plan, calibration is not None)
    clock = Timings()
    subject = _subject_of(
        model, args, kwargs, config, state=state, dynamic_shapes=dynamic_shapes, device=device
    )
    for path, decision in replay(subject, plan, config, calibration, progress=progress, clock=clock):
        subject.put(path, decision, None, clock)
    return subject.result(None, clock)


def plan_from_sets(
    captured: Captured,
    removed: Mapping[str, Iterable[int]],
    *,
    granularity: Iterable[str] = ("channel",),
    include: Iterable[str] = (),
) -> PruningPlan:
    """The plan that removes given channel sets, however they were chosen; :func:`apply` carries it out.

    Args:
        captured: what :func:`fasp_fx.capture` returned.
        removed: for groups by their names, which channel sets go, counted from zero (``Member.sets`` says
            which set an index of a weight belongs to).
        granularity, include: as for :func:`analyze`, which gives the groups.

    Raises:
        ArgumentError: ``captured`` is no capture, or ``removed`` no mapping.
        PlanError: a group is not known or cannot be pruned, or a set is not there; or the blocks of a group
            would lose unequal counts, or too many.
    """
    if not isinstance(captured, Captured):
        raise ArgumentError(f"captured is a {type(captured).__name__}; pass what fasp_fx.capture returned")
    if not isinstance(removed, Mapping):
        raise ArgumentError(
            f"removed is a {type(removed).__name__}; pass a dict of channel sets by the names of groups"
        )
    analysis = analyze_for(captured.checked(), PruningConfig(granularity=granularity, include=include))
    groups = {group.name: group for group in analysis.chosen}
    gone = np.zeros(int(analysis.labels.max(initial=-1)) + 1, dtype=bool)
    for name, positions in removed.items():
        if name not in groups:
            raise PlanError(_why_not(str(name), analysis))
        group = groups[name]
        found = np.asarray([*positions] if isinstance(positions, Iterable) else positions)
        if found.size and found.dtype.kind not in "iu":
            raise PlanError(
                f"'{name}' loses {positions!r:.80}; give the numbers of channel sets, counted from zero (of a"
                " mask, mask.nonzero().flatten())"
            )
        wanted = np.unique(found.astype(np.int64))
        if len(wanted) and not (wanted[0] >= 0 and wanted[-1] < group.size):
            raise PlanError(
                f"'{name}' has the channel sets 0 to {group.size - 1}, not"
                f" {wanted[0] if wanted[0] < 0 else wanted[-1]}"
            )
        lost = {
            int(block): int((group.block_of[wanted] == block).sum()) for block in np.unique(group.block_of)
        }
        if len(set(lost.values())) > 1:
            raise PlanError(
                f"the {group.blocks} blocks of '{name}' must lose equally many channel sets, not"
                f" {', '.join(map(str, lost.values()))}"
            )
        if group.width - max(lost.values()) < group.needed:
            raise PlanError(
                f"'{name}' keeps at least {group.needed} of the {group.width} channel sets of a block; remove"
                " fewer"
            )
        gone[group.sets[wanted]] = True
    return make_plan(captured.program, analysis, Decision(gone[analysis.labels]))


def _why_not(name: str, analysis: Analysis) -> str:
    """Why a group is not among those that can be pruned."""
    known = next((group for group in analysis.groups if group.name == name), None)
    if known is None:
        return f"'{name}' is no group of this model; analyze(...).groups has their names"
    if known.status == FROZEN:
        return f"'{name}' cannot be pruned: {known.reason}"
    if known.status not in (PRUNABLE, *analysis.include):
        return f"'{name}' is {known.status} ({known.reason}); pass include=({known.status!r},)"
    return f"'{name}' loses {known.granularity}s, which granularity= does not name; add {known.granularity!r}"


def _subject_of(
    model: Model | Captured,
    args: Any,
    kwargs: dict[str, Any] | None,
    config: PruningConfig | None = None,
    run: bool = True,
    **how: Any,
) -> Subject:
    """A model to be pruned, which is captured unless it was.

    Args:
        config: what is asked for.
        run: compare what is captured now with the model on the example inputs, which runs both.
        how: the keywords of :func:`capture`.

    Raises:
        ArgumentError: a captured model with what it was captured with already, or with weights that changed;
            or an option that speaks of the whole of a model that is captured in parts.
    """
    loss = None if config is None or config.loss in _PARTIAL_LOSSES else config.loss
    is_given = isinstance(model, Captured)
    if isinstance(model, Captured):
        check_given(model.device(), args, kwargs, **how)
    captured = model if isinstance(model, Captured) else _captured(model, args, kwargs, loss, run=run, **how)
    if not isinstance(captured, CapturedParts):
        return Subject({"": captured.checked()}, how["device"])
    check_parts_help(captured.error, captured.model, None, loss=loss)
    return InParts(captured, is_own=not is_given)


def _captured(model: Model, args: Any, kwargs: dict[str, Any] | None, loss: Any, **how: Any) -> Captured:
    """A model as one program, or else in parts, where nothing speaks of the whole of it."""
    try:
        return capture_whole(model, args, kwargs, **how)
    except tolerable(CaptureError) as error:
        check_parts_help(error, model, how["dynamic_shapes"], state=how["state"], loss=loss)
        return capture_parts(error, model, args, kwargs, how["device"])


__all__ = ["analyze", "apply", "capture", "measure", "plan_from_sets", "prune"]
