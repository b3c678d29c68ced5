"""The main job: capture, analyse, observe, choose, restore, rewrite."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from . import plan as plans
from ._exactness import carry_out
from ._observe._calibration import read_batches
from ._observe._marks import Marks
from ._observe._runner import Runner
from ._observe._visit import Decision, Observer
from ._parts._faithful import compared
from ._parts._prune import Stages, analyze_in_parts, apply_in_parts, prune_in_parts
from ._program import Program
from ._result import Result
from .allocation import Allocation, Budget, checked, uniform
from .analysis import Analysis, analyze_program
from .capture import capture
from .errors import ArgumentError, CaptureError, NothingPrunableError, SparsityError
from .passes import split_fused
from .plan import PruningPlan
from .report import cache_bytes, make_report
from .restoration import ridge
from .scoring import Score, resolve

Model = nn.Module | fx.GraphModule | ExportedProgram


def analyze(
    model: Model,
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
        ArgumentError, CaptureError: see :func:`fasp_fx.capture.capture`.
    """
    granularity, include = _check_choice(granularity, include)
    try:
        program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes, state=state)
    except CaptureError as error:
        if dynamic_shapes is not None:
            raise
        return analyze_in_parts(error, model, args, kwargs, _stages(granularity, include))
    return analyze_program(program, split_fused, granularity, include)


def prune(
    model: Model,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    sparsity: float = 0.2,
    score: Literal["fasp", "magnitude", "random"] | Score = "fasp",
    restore: Literal["least-squares"] | None = "least-squares",
    allocation: Literal["uniform"] | Allocation = "uniform",
    propagate: bool = True,
    granularity: Iterable[str] = ("channel",),
    include: Iterable[str] = (),
    state: tuple[str, ...] = (),
    round_to: int = 1,
    padding_mask: str | None = None,
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
        allocation: ``"uniform"``: every prunable group loses the same fraction; or a callable (:data:`fasp_fx.allocation.Allocation`).
        propagate: later layers are observed behind the already pruned earlier ones.
        granularity: what goes together: ``"channel"``, single channels; ``"head"``, whole attention heads with their rows of W_Q, W_K and W_V and
            columns of W_O (a KV head takes its query heads along); ``"expert"``, whole experts of a mixture with their rows of the router, as if they
            were never chosen. With ``("head",)`` nothing but heads goes; with both, heads in attention and channels elsewhere.
        include: ``"approximate"`` prunes also groups that cross a norm (the residual stream of a transformer). Norms by mean squares, and layer norms,
            go on to divide by the dense count, so that the result is that of the dense model whose producers are zero there. ``"exempt"`` prunes also
            channels contracted between two activations (rows of W_Q and W_K), by the norms of both.
        state: names of arguments and outputs that may become narrower.
        round_to: kept widths (per block) are multiples of this.
        padding_mask: name of the input ``[batch, tokens]`` (``"attention_mask"``, say) that is zero where a token of the first input is padding; such
            tokens of the calibration data enter neither scores nor repairs. ``None``: every token counts.
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
    options = Options(sparsity, score, restore, allocation, propagate, granularity, include, round_to, padding_mask)
    granularity, include = options.granularity, options.include
    clock = Clock()
    try:
        program = _compared(model, args, kwargs, dynamic_shapes=dynamic_shapes, state=state, device=device)
    except CaptureError as error:
        if dynamic_shapes is not None:
            raise
        if padding_mask is not None:
            raise ArgumentError(
                f"padding_mask='{padding_mask}' needs a model that is captured as a whole; leave it out and calibrate on batches without padding"
            ) from error
        return prune_in_parts(
            error,
            model,
            args,
            kwargs,
            _stages(granularity, include),
            allocate=options.allocate,
            observe=options.observe,
            calibration=calibration,
            needs_data=options.needs_data,
            requested=sparsity,
            propagate=propagate,
            device=device,
            progress=progress or (lambda fraction: None),
            on_analysis=on_analysis,
        )
    analysis, decision = decide(program, options, calibration, device=device, progress=progress, on_analysis=on_analysis, clock=clock)
    return rewrite(program, analysis, decision, sparsity, clock)


class Options:
    """The checked options of one pruning, and what follows from them.

    Raises:
        ArgumentError, SparsityError: an option is out of range or not known.
    """

    def __init__(
        self,
        sparsity: float = 0.2,
        score: Literal["fasp", "magnitude", "random"] | Score = "fasp",
        restore: Literal["least-squares"] | None = "least-squares",
        allocation: Literal["uniform"] | Allocation = "uniform",
        propagate: bool = True,
        granularity: Iterable[str] = ("channel",),
        include: Iterable[str] = (),
        round_to: int = 1,
        padding_mask: str | None = None,
    ) -> None:
        self._allocation = _check_arguments(sparsity, restore, allocation, round_to)
        self.granularity, self.include = _check_choice(granularity, include)
        self.sparsity, self.round_to, self.propagate, self.padding_mask = sparsity, round_to, propagate, padding_mask
        self.score, scores_data = resolve(score)
        self.restore = ridge if restore is not None else None
        self.needs_data = scores_data or restore is not None

    def allocate(self, budget: Budget) -> list[int]:
        """How many channel sets each group of the budget loses."""
        return checked(self._allocation(budget, self.sparsity, self.round_to), budget)

    def observe(self, analysis: Analysis, lost: list[int], batches: list[list[Any]] | None, advance: Callable[[float], None]) -> Decision:
        """Run the calibration batches, choose what goes and repair what stays."""
        runner = None if batches is None else Runner(analysis.program, batches)
        marks = None if batches is None else Marks(analysis.program, batches, self.padding_mask, hold_out=self.restore is not None)
        with torch.no_grad():
            return Observer(analysis, lost, self.score, self.restore, self.propagate).run(runner, marks, advance)


def decide(
    program: Program,
    options: Options,
    calibration: Iterable[Any] | None,
    *,
    device: torch.device | str | None = None,
    progress: Callable[[float], None] | None = None,
    on_analysis: Callable[[Analysis], None] | None = None,
    clock: Clock,
) -> tuple[Analysis, Decision]:
    """Analyse a captured program, calibrate it and choose what goes; see :func:`prune`."""
    _check_weights(program)
    clock.lap("capture")
    analysis = analyze_program(program, split_fused, options.granularity, options.include)
    lost = _allocate(analysis, options)
    clock.lap("analysis")
    if on_analysis is not None:
        on_analysis(analysis)
    batches = read_batches(program, calibration, None if device is None else torch.device(device)) if options.needs_data else None
    decision = options.observe(analysis, lost, batches, progress or (lambda fraction: None))
    clock.lap("calibration")
    return analysis, decision


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
    clock = Clock()
    try:
        program = _compared(model, args, kwargs, dynamic_shapes=dynamic_shapes, state=state)
    except CaptureError as error:
        if dynamic_shapes is not None:
            raise
        return apply_in_parts(error, model, plan, args, kwargs, _stages(plan.granularity, plan.include), lambda found: plans.check_fingerprint(plan, found))
    plans.check_fingerprint(plan, plans.program_fingerprint(program))
    clock.lap("capture")
    analysis = analyze_program(program, split_fused, plan.granularity, plan.include)
    decision = Decision(plans.gone_of(plan, analysis))
    clock.lap("analysis")
    return rewrite(program, analysis, decision, None, clock)


class Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def _check_arguments(sparsity: float, restore: object, allocation: Literal["uniform"] | Allocation, round_to: int) -> Allocation:
    if not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1:
        raise SparsityError(f"sparsity={sparsity!r} is not in (0, 1); 0.2 removes a fifth")
    if restore not in ("least-squares", None):
        raise ArgumentError(f"restore={restore!r} is not known; use 'least-squares' or None")
    if allocation != "uniform" and not callable(allocation):
        raise ArgumentError(f"allocation={allocation!r} is not known; use 'uniform' or a callable (fasp_fx.allocation.Allocation)")
    if not isinstance(round_to, int) or round_to < 1:
        raise ArgumentError(f"round_to={round_to!r} is not a positive integer")
    return allocation if callable(allocation) else uniform


def _compared(model: Model, args: Any, kwargs: dict[str, Any] | None, **options: Any) -> Program:
    """Capture, and hold the program against the model."""
    return compared(capture(model, args, kwargs, **options), model, args, kwargs)


def _check_choice(granularity: Iterable[str], include: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    for name, given, known in (("granularity", granularity, ("channel", "head", "expert")), ("include", include, ("approximate", "exempt"))):
        if isinstance(given, str) or not isinstance(given, Iterable) or not set(given) <= set(known) or (name == "granularity" and not tuple(given)):
            raise ArgumentError(f"{name}={given!r} is not known; pass a tuple of {', '.join(map(repr, known))}")
    return tuple(granularity), tuple(include)


def _stages(granularity: tuple[str, ...], include: tuple[str, ...]) -> Stages:
    """What each part goes through where a model is pruned by its submodules."""
    return Stages(
        partial(capture, image_sizes=True),  # a part can be called with features of many sizes
        lambda program: analyze_program(program, split_fused, granularity, include),
        lambda program, analysis, decision: rewrite(program, analysis, decision, None, Clock()),
    )


def _check_weights(program: Program) -> None:
    for name, tensor in program.weights().items():
        if tensor.device.type == "meta":
            raise ArgumentError(f"'{name}' is on the meta device and has no values; analyze() works without weights, prune() needs them")


def _allocate(analysis: Analysis, options: Options) -> list[int]:
    budget = Budget(analysis)
    if not budget.groups:
        reasons = sorted({group.reason for group in analysis.groups if group.reason})
        raise NothingPrunableError("no group of this model can be pruned: " + ("; ".join(reasons) if reasons else "it has no coupled weights"))
    return options.allocate(budget)


def plan_of(program: Program, analysis: Analysis, decision: Decision) -> PruningPlan:
    """What was decided, as data; its result is not known yet."""
    budget = Budget(analysis)
    entries = plans.planned(budget.groups, decision.gone, analysis)
    groups = tuple(entry for entry in entries if entry.removed_sets)
    return PruningPlan(
        plans.program_fingerprint(program),
        groups,
        budget.sparsity([entry.removed_sets for entry in entries]),
        tuple(plans.SplitWeight(name, part.name, part.dim, part.rows) for name, part in analysis.program.parts.items()) if groups else (),
        granularity=tuple(sorted(analysis.granularity)),
        include=tuple(sorted(analysis.include)),
        folds=program.folds,
    )


def rewrite(program: Program, analysis: Analysis, decision: Decision, requested: float | None, clock: Clock, whole: bool = False) -> Result:
    """Take out of a program what was decided for its analysis, hold the result against the masked dense program, and report it.

    Args:
        whole: raise where not all of what was decided holds, rather than leave some groups whole.

    Raises:
        VerificationError: nothing of what was decided holds.
    """
    held = carry_out(program, analysis, decision, clock.lap, whole)
    plan = plan_of(program, analysis, held.decision)
    plan = replace(plan, result=plans.fingerprint(dict(held.module.named_parameters(remove_duplicate=False))))
    report = make_report(analysis, plan, held.decision, program.parameters(), dict(held.module.named_parameters()), requested, clock.seconds, held.left)
    cache = cache_bytes(program.module.graph, held.module.graph, program.state_outputs)
    report = replace(report, cache=cache, notes=(*report.notes, *held.notes))
    return Result(held.module, held.exported, plan, report, held.rewritten.signature)
