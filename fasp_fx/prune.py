"""The main job: capture, analyse, observe, choose, restore, rewrite."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from . import plan as plans
from ._calibration import read_batches
from ._observe import Decision, Observer
from ._program import Program
from ._result import Result, finish
from ._runner import Runner
from .allocation import Budget, uniform
from .analysis import Analysis, analyze_program
from .capture import capture
from .errors import ArgumentError, NothingPrunableError, PlanError, SparsityError
from .passes import PadValueHeads, Pass, PinAttentionScale, Pipeline, RemoveChannels, RestoreWeights, SplitFusedProducers
from .plan import PruningPlan
from .report import make_report
from .restoration import least_squares
from .scoring import Score, resolve

Model = nn.Module | fx.GraphModule | ExportedProgram


def split_fused(program: Program, analysis: Analysis) -> Program | None:
    """Split the fused producers that stand in the way, or ``None`` if none can be."""
    rewritten = Pipeline([SplitFusedProducers(analysis)], analysis)(program)
    return None if rewritten is program else replace(rewritten, numbers={})


def analyze(model: Model, args: Any = (), kwargs: dict[str, Any] | None = None, *, dynamic_shapes: Any = None, state: tuple[str, ...] = ()) -> Analysis:
    """Find the coupled groups of a model. Weights are not read: a model on the meta device will do.

    Args:
        model: module in evaluation mode, graph module or exported program.
        args, kwargs: example inputs.
        dynamic_shapes: as for ``torch.export.export``; inferred if ``None``.
        state: names of arguments and outputs that may become narrower (caches are found by themselves).

    Raises:
        ArgumentError, CaptureError: see :func:`fasp_fx.capture.capture`.
    """
    return analyze_program(capture(model, args, kwargs, dynamic_shapes=dynamic_shapes, state=state), split_fused)


def prune(
    model: Model,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    sparsity: float = 0.2,
    score: Literal["fasp", "magnitude", "random"] | Score = "fasp",
    restore: Literal["least-squares"] | None = "least-squares",
    allocation: Literal["uniform"] = "uniform",
    propagate: bool = True,
    granularity: tuple[str, ...] = ("channel",),
    include: Iterable[str] = (),
    state: tuple[str, ...] = (),
    round_to: int = 1,
    dynamic_shapes: Any = None,
    device: torch.device | str | None = None,
    progress: Callable[[float], None] | None = None,
    on_analysis: Callable[[Analysis], None] | None = None,
) -> Result:
    """Make a model physically smaller; the caller's model is not touched.

    Args:
        model: module in evaluation mode, graph module or exported program.
        args, kwargs: example inputs.
        calibration: an iterable of batches: tensors, tuples of positional arguments or dicts of keyword arguments.
        sparsity: fraction to remove of the weights of linear operators in prunable and exempt groups, in (0, 1).
        score: ``"fasp"``, ``"magnitude"``, ``"random"``, or a callable (:mod:`fasp_fx.scoring`).
        restore: ``"least-squares"`` or ``None``.
        allocation: ``"uniform"``: every prunable group loses the same fraction.
        propagate: later layers are observed behind the already pruned earlier ones.
        granularity: ``("channel",)``.
        include: reserved for approximate and exempt groups, which this version leaves whole.
        state: names of arguments and outputs that may become narrower.
        round_to: kept widths (per block) are multiples of this.
        dynamic_shapes: as for ``torch.export.export``; inferred if ``None``.
        device: where to capture and calibrate; batches are moved there. ``None``: the model's device.
        progress: called with the fraction of the calibration done.
        on_analysis: called with the analysis, once the sparsity is known to be in reach and before the first calibration batch is asked for.

    Raises:
        SparsityError: outside (0, 1) or out of reach.
        CalibrationError: the calibration data does not fit.
        NothingPrunableError: no group can be pruned.
        ArgumentError, CaptureError: see :func:`fasp_fx.capture.capture`.
    """
    _check_arguments(sparsity, restore, allocation, granularity, include, round_to)
    score_function, needs_data = resolve(score)
    clock = _Clock()
    program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes, state=state, device=device)
    _check_weights(program)
    clock.lap("capture")
    analysis = analyze_program(program, split_fused)
    lost = _allocate(analysis, sparsity, round_to)
    clock.lap("analysis")
    if on_analysis is not None:
        on_analysis(analysis)
    with torch.no_grad():
        runner = None
        if needs_data or restore is not None:
            runner = Runner(analysis.program, read_batches(program, calibration, None if device is None else torch.device(device)))
        observer = Observer(analysis, lost, score_function, least_squares if restore is not None else None, propagate)
        decision = observer.run(runner, progress or (lambda fraction: None))
    del runner, observer
    clock.lap("calibration")
    return _rewrite(program, analysis, decision, sparsity, clock)


def apply(
    model: Model,
    plan: PruningPlan,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    state: tuple[str, ...] = (),
) -> Result:
    """Replay a plan on the model it was made for; no calibration data, and so no restoration.

    Raises:
        PlanError: the plan is for another model (or for this one before it was pruned).
    """
    clock = _Clock()
    program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes, state=state)
    found = plans.program_fingerprint(program)
    if found != plan.fingerprint:
        own = found == plan.result
        raise PlanError(
            "the plan was already applied to this model: it is the plan's own result"
            if own
            else f"the plan is for another model: its fingerprint is {plan.fingerprint[:12]}…, this model's is {found[:12]}…; make a plan for this model"
        )
    clock.lap("capture")
    analysis = analyze_program(program, split_fused)
    decision = Decision(plans.gone_of(plan, analysis))
    clock.lap("analysis")
    return _rewrite(program, analysis, decision, None, clock)


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def _check_arguments(sparsity: float, restore: object, allocation: object, granularity: object, include: Iterable[str], round_to: int) -> None:
    if not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1:
        raise SparsityError(f"sparsity={sparsity!r} is not in (0, 1); 0.2 removes a fifth")
    if restore not in ("least-squares", None):
        raise ArgumentError(f"restore={restore!r} is not known; use 'least-squares' or None")
    if allocation != "uniform":
        raise ArgumentError(f"allocation={allocation!r} is not known; use 'uniform'")
    if tuple(granularity) != ("channel",):  # type: ignore[arg-type]
        raise ArgumentError(f"granularity={granularity!r} is not supported by this version; use ('channel',)")
    if tuple(include):
        raise ArgumentError(f"include={tuple(include)!r} is not supported by this version; approximate and exempt groups stay whole")
    if not isinstance(round_to, int) or round_to < 1:
        raise ArgumentError(f"round_to={round_to!r} is not a positive integer")


def _check_weights(program: Program) -> None:
    for name, tensor in program.weights().items():
        if tensor.device.type == "meta":
            raise ArgumentError(f"'{name}' is on the meta device and has no values; analyze() works without weights, prune() needs them")


def _allocate(analysis: Analysis, sparsity: float, round_to: int) -> list[int]:
    budget = Budget(analysis)
    if not budget.groups:
        reasons = sorted({group.reason for group in analysis.groups if group.reason})
        raise NothingPrunableError("no group of this model can be pruned: " + ("; ".join(reasons) if reasons else "it has no coupled weights"))
    return uniform(budget, sparsity, round_to)


def _rewrite(program: Program, analysis: Analysis, decision: Decision, requested: float | None, clock: _Clock) -> Result:
    budget = Budget(analysis)
    entries = plans.planned(budget.groups, decision.gone, analysis)
    reached = budget.sparsity([entry.removed_sets for entry in entries])
    groups = [entry for entry in entries if entry.removed_sets]
    splits = tuple(plans.SplitWeight(name, part.name, part.dim, part.rows) for name, part in analysis.program.parts.items())
    plan = PruningPlan(plans.program_fingerprint(program), tuple(groups), reached, splits if groups else ())
    # Without anything to remove the program stays as it was captured, fused producers included.
    start = analysis.program if groups else program
    passes: list[Pass] = [
        PinAttentionScale(analysis),
        RestoreWeights(decision.weights),
        RemoveChannels(analysis, decision.gone),
        PadValueHeads(analysis),
    ]
    rewritten = Pipeline(passes, analysis)(start) if groups else start
    clock.lap("passes")
    module, exported = finish(rewritten)
    clock.lap("export")
    plan = replace(plan, result=plans.fingerprint(dict(module.named_parameters(remove_duplicate=False))))
    report = make_report(analysis, plan, decision, dict(program.module.named_parameters()), dict(module.named_parameters()), requested, clock.seconds)
    return Result(module, exported, plan, report, rewritten.signature)
