"""The main job: capture a model; and of a model, or of what was captured of one: analyse it, measure it,
prune it, carry a plan out on it. The steps between are :func:`decide`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Unpack, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from fasp_fx.allocation import Budget, Cap, Costs, Macs, Parameters, Point, check_costs
from fasp_fx.analysis import Analysis, Groups, PruningPlan, gone_of, running_fingerprint, steps_to
from fasp_fx.base import (
    Shown,
    advance_of,
    between,
    check_callable,
    check_kind,
    digest_of,
    in_usual_modes,
    one_at_a_time,
    path_of,
    shows,
)
from fasp_fx.calibration import (
    Batches,
    BudgetTrial,
    Consumers,
    Decision,
    HeldOut,
    Journal,
    Ledger,
    Ranks,
    check_calibration,
    ended_together,
    nothing,
    places_of,
)
from fasp_fx.capturing import Captured, Model, capture_model, check_given, model_copy
from fasp_fx.errors import ArgumentError, BudgetError, NothingPrunableError, PlanError
from fasp_fx.storage import claim, refuse_other

from ._agreement import with_agreement
from ._config import Granularity, Include, PruningConfig, PruningOptions, key_of
from ._method import (
    Constraint,
    Measured,
    Measurement,
    Method,
    allocate,
    by_score,
    calibrate,
    check_request,
    constrained,
    open_budget,
)
from ._report import Prediction
from ._result import Result
from ._subject import InParts, PartsAnalysis, Subject, Whole, analyze_for, check_weights, make_plan, split

#: the part of the progress shown that measuring costs takes, where they are measured
PROGRESS_SHARE_MEASURING = 0.35
#: the part of the rest that a search takes
PROGRESS_SHARE_SEARCHING = 0.6
_NOTHING_GOES = (
    "nothing goes: what was asked for is less than half a step of any group; ask for more, or for a smaller"
    " round_to"
)


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

    Examples:
        >>> captured = fasp_fx.capture(model, (x,))
        >>> for sparsity in (0.2, 0.5):
        ...     result = fasp_fx.prune(captured, score="magnitude", restore=None, sparsity=sparsity)
        ...     print(result.report.parameters)
        (884, 718)
        (884, 434)
    """
    return capture_model(model, args, kwargs, state=state, dynamic_shapes=dynamic_shapes, device=device)


@one_at_a_time
@in_usual_modes
def analyze(
    model: Model | Captured,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    state: tuple[str, ...] = (),
    granularity: Collection[Granularity] = PruningConfig.granularity,
    include: Collection[Include] = (),
) -> Analysis | PartsAnalysis:
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

    Examples:
        >>> for group in fasp_fx.analyze(captured).groups:
        ...     print(group.name, group.status, group.size)
        0.weight frozen 8
        2.weight prunable 32
        4.weight prunable 16
        4.weight#2 frozen 4
    """
    config = PruningConfig(granularity=granularity, include=include)
    how: dict[str, Any] = {"state": state, "dynamic_shapes": dynamic_shapes, "device": None}
    return _subject_of(model, args, kwargs, run=False, **how).analyze(config)


@shows("pruning")
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
    progress: Shown = None,
    on_analysis: Callable[[Analysis], None] | None = None,
    group: dist.ProcessGroup | None = None,
    checkpoint: str | Path | None = None,
    held_out: Iterable[Any] | None = None,
    **options: Unpack[PruningOptions],
) -> Result:
    """Make a model physically smaller; the caller's model is not touched.

    Args:
        model: module in evaluation mode, graph module or exported program; or what :func:`fasp_fx.capture`
            made of one.
        args, kwargs: example inputs.
        calibration: an iterable of batches: tensors, tuples of positional arguments or dicts of keyword
            arguments. Or several, by the names of their sources, ``{"web": batches, "code": batches}``: each
            counts for as much, however many tokens it has.
        config: the options; ``None``: the defaults.
        costs: cost curves that :func:`fasp_fx.measure` gave, for an allocation that wants them; ``None``:
            they are measured.
        state: names of arguments and outputs that may become narrower.
        dynamic_shapes: as for ``torch.export.export``; inferred if ``None``.
        device: where to capture and calibrate; batches are moved there. ``None``: the model's device.
        progress: a function that is called with the fraction of the calibration done. ``None``: a bar where
            somebody looks on, in a terminal or a notebook; ``False``: nothing.
        on_analysis: called with the analysis, once the sparsity or budget is known to be in reach and before
            the first calibration batch is asked for.
        group: processes of ``torch.distributed`` that call this together, with the same arguments: each runs
            some of the batches, and all get the same result (docs/processes.md).
        checkpoint: a folder that keeps what was decided, consumer by consumer: the same call with the same
            folder goes on from there, to the same result (docs/larger-than-memory.md).
        held_out: batches like those that calibrate, on which ``report.agreement`` is measured afterwards, of
            each source by itself. ``None``: the last eighth of ``calibration``, or of each source, if it has
            eight batches, which then calibrates nothing. ``()``: nothing is measured.
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

    Examples:
        >>> result = fasp_fx.prune(model, (x,), calibration=batches, sparsity=0.3)
        >>> result.module(torch.randn(3, 8)).shape
        torch.Size([3, 4])
        >>> [tuple(weight.shape) for weight in result.module.parameters() if weight.dim() == 2]
        [(20, 8), (16, 20), (4, 16)]
    """
    check_callable(on_analysis=on_analysis)
    config = PruningConfig.of(config, options)
    if Method.of(config).needs_data:
        check_calibration(calibration)
    how: dict[str, Any] = {"state": state, "dynamic_shapes": dynamic_shapes, "device": device}
    subject, data = _subject_of(model, args, kwargs, config, **how), HeldOut(calibration, held_out)
    result = prune_subject(
        subject, config, data, Job(progress, on_analysis, costs, Ranks.of(group), checkpoint)
    )
    # Parts are exchanged in a copy of the caller's model.
    caller = model.in_parts.model if isinstance(model, Captured) and model.in_parts else model
    dense: Any = subject.programs.get("", caller)
    return cast(Result, with_agreement(result, dense, result.module, data.rows))


@shows("measuring")
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
    progress: Shown = None,
    group: dist.ProcessGroup | None = None,
    part: int | None = 1,
    **options: Unpack[PruningOptions],
) -> Costs:
    """Predict what each coupled group costs, channel set by channel set.

    The dense model runs on the batches, forward and, unless ``loss=None``, back. The curves serve
    :func:`fasp_fx.prune` for any number of sparsities and budgets, with the same ``score``, ``granularity``
    and ``include``.

    Args:
        model, args, kwargs, state, dynamic_shapes, device: as for :func:`fasp_fx.prune`.
        calibration: an iterable of batches; what autograd keeps of one has to fit the device. Some thousand
            tokens do.
        config, options: as for :func:`fasp_fx.prune`; ``score``, ``loss``, ``granularity`` and ``include``
            count.
        progress: as for :func:`fasp_fx.prune`.
        group: as for :func:`fasp_fx.prune`.
        part: one in so many sequences is run; ``None``: as many as :func:`fasp_fx.prune` runs for its
            ``quality``.

    Raises:
        ArgumentError: an option is not known or out of range.
        CalibrationError: the batches do not fit, the loss fails or does not depend on the weights, or its
            gradients vanish or are not finite.
        CaptureError: see :func:`fasp_fx.capture`.

    Examples:
        >>> costs = fasp_fx.measure(captured, calibration=batches)
        >>> sorted(costs)
        ['2.weight', '4.weight']
        >>> smaller = fasp_fx.prune(captured, calibration=batches, sparsity=0.4, costs=costs)
    """
    config = PruningConfig.of(config, options)
    check_calibration(calibration)
    return measure_subject(
        _subject_of(model, args, kwargs, config, state=state, dynamic_shapes=dynamic_shapes, device=device),
        config,
        calibration,
        Job(progress, ranks=Ranks.of(group)),
        part,
    )


@shows("pruning")
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
    progress: Shown = None,
    **options: Unpack[PruningOptions],
) -> Result:
    """Carry out a plan on the model it was made for, whatever chose it, or on one that was trained otherwise
    or not at all; a chain of plans (:meth:`fasp_fx.PruningPlan.then`) one after the other, on eager copies.

    Args:
        model, args, kwargs, dynamic_shapes, state, device, progress: as for :func:`prune`.
        plan: says what goes.
        calibration: batches to restore on what stays; ``None``: it is left as it is.
        config, options: how to restore: ``restore`` and ``drift`` of :class:`fasp_fx.PruningConfig`.

    Raises:
        ArgumentError: the plan is none, or an option says what goes or how to restore without data.
        PlanError: the plan is for another model (or for this one before it was pruned); names a weight.
        EagerError: a step of a chain makes something that no copy of the model's class is.
        CalibrationError: the calibration data does not fit.

    Examples:
        >>> again = fasp_fx.apply(model, result.plan, (x,), calibration=batches)
        >>> again.plan.groups == result.plan.groups
        True
    """
    config = restoring_config(PruningConfig.of(config, options), plan, calibration is not None)
    how: dict[str, Any] = {"state": state, "dynamic_shapes": dynamic_shapes, "device": device}
    given = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else {}
    for step in steps_to(plan, given):
        model = apply(model, step, args, kwargs, progress=False, **how).eager(cast(nn.Module, model))
    subject = _subject_of(model, args, kwargs, config, **how)
    for path, decision in replay(subject, plan, config, calibration, Job(progress)):
        subject.put(path, decision, None)
    result = subject.result(None)
    return replace(result, plan=replace(result.plan, earlier=plan.earlier))


def plan_from_sets(
    captured: Captured,
    removed: Mapping[str, Iterable[int]],
    *,
    granularity: Collection[Granularity] = PruningConfig.granularity,
    include: Collection[Include] = (),
) -> PruningPlan:
    """The plan that removes given channel sets, however they were chosen; :func:`apply` carries it out.

    Args:
        captured: what :func:`fasp_fx.capture` returned.
        removed: for groups by their names, which channel sets go, counted from zero (``Member.sets`` says
            which set an index of a weight belongs to).
        granularity, include: as for :func:`analyze`, which gives the groups.

    Raises:
        PlanError: a group is not known or cannot be pruned, or a set is not there; or the blocks of a group
            would lose unequal counts, or too many.

    Examples:
        >>> plan = fasp_fx.plan_from_sets(captured, {"4.weight": [0, 5]})
        >>> fasp_fx.apply(captured, plan).module.get_parameter("2.weight").shape
        torch.Size([14, 32])
    """
    analysis = analyze_for(captured.checked(), PruningConfig(granularity=granularity, include=include))
    groups = {group.name: group for group in analysis.chosen}
    decision = nothing(analysis)
    for name, positions in removed.items():
        if name not in groups:
            raise PlanError(
                f"'{name}' cannot be pruned here; analyze(...).groups has those that can with this"
                " granularity= and include=, and why others cannot"
            )
        group, sets = groups[name], np.asarray([*positions])
        if len(sets) and not (sets.dtype.kind in "iu" and np.isin(sets, np.arange(group.size)).all()):
            raise PlanError(
                f"'{name}' loses {positions!r:.80}; give the numbers of channel sets, from 0 to"
                f" {group.size - 1} (of a mask, mask.nonzero().flatten())"
            )
        decision.take(analysis, group, sets.astype(int))
    plan = make_plan(captured.program, analysis, decision)
    gone_of(plan, analysis)
    return plan


# --- The steps from a captured model to a smaller one: analyse, constrain, measure, allocate, calibrate, and
# rewrite, which the check is a part of.


@dataclass(frozen=True)
class Job:
    """What a pruning is given besides a model, options and data.

    Attributes:
        progress, on_analysis, costs, checkpoint: as for :func:`fasp_fx.prune`.
        ranks: the processes that share the batches.
        loss: what ``loss="auto"`` stands for.
        constraint: which counts belong together, and which are possible; ``None``: all are.
    """

    progress: Shown = None
    on_analysis: Callable[[Any], None] | None = None
    costs: Costs | None = None
    ranks: Ranks = field(default_factory=Ranks)
    checkpoint: str | Path | None = None
    loss: Literal["outputs", "next-token"] = "outputs"
    constraint: Constraint | None = None


def prune_subject(
    subject: Subject, config: PruningConfig, calibration: Iterable[Any] | None, job: Job
) -> Result:
    """The smaller model; errors as for :func:`fasp_fx.prune`."""
    for path, decision in decide(subject, config, calibration, job):
        subject.put(path, decision, config)
    return subject.result(config).with_report(prediction=subject.prediction)


def decide(
    subject: Subject, config: PruningConfig, calibration: Iterable[Any] | None, job: Job
) -> Iterator[tuple[str, Decision]]:
    """What goes of each program of a model, one after another: whoever puts a program into its place before
    asking for the next lets that see it. Errors as for :func:`fasp_fx.prune`.
    """
    ranks, advance = job.ranks, advance_of(job.progress)
    check_weights(subject.programs.values())
    folder = _checkpoint_folder(job.checkpoint, config)
    fingerprint = functools.cache(subject.fingerprint)
    method = Method.of(config, job.loss)
    costs = _checked_costs(job.costs, method, fingerprint)
    analysis = subject.analyze(config)
    budget = constrained(open_budget(config, analysis, subject.count), job.constraint)
    check_request(method, budget, costs, job.constraint)
    if job.on_analysis is not None:
        job.on_analysis(analysis)
    batches = subject.read(calibration) if method.needs_data else None
    ranks.check_alike(fingerprint, batches or (), vars(config))
    consumers, inputs = _consumers(subject, config), functools.partial(subject.inputs, batches=batches)
    measured, done = Measured(method), 0.0
    if batches is not None and (method.needs_costs or (method.gradients and method.loss is not None)):
        done = PROGRESS_SHARE_MEASURING
        wants_curves = method.needs_costs and (costs is None or method.runs_trials)
        measured = Measurement(consumers, inputs, ranks, wants_curves).run(method, between(advance, 0, done))
        method = measured.method
        if costs is None and wants_curves:
            costs = measured.costs(fingerprint())
    searched = done + PROGRESS_SHARE_SEARCHING * (1 - done) if method.runs_trials else done
    budget, candidates = served_budget(subject, budget, analysis), subject.trial(measured.trials)
    trial = None if candidates is None else BudgetTrial(candidates, budget, between(advance, done, searched))
    lost = allocate(method, budget, costs, trial, job.constraint)
    subject.prediction = None if costs is None else _predicted(method, costs, analysis, lost)
    subject.notes = [*(trial.notes if trial else ()), *([] if any(lost) else [_NOTHING_GOES])]
    if folder is not None and "" not in consumers and not ranks.rank:
        claim(folder, "prune", {"parts": list(consumers)})
    shares, advance = split(subject.analyses, lost), between(advance, searched, 1.0)
    for number, (path, share) in enumerate(shares.items()):
        within = between(advance, number / len(shares), (number + 1) / len(shares))
        within(0.0)
        if path and not any(share):
            continue
        calls = None if batches is None else inputs(path)
        if calls is not None and not calls:
            continue
        place = folder and folder / (f"part-{number}" if path else "")
        journal = None if ranks.rank else _journal(place, consumers[path], config, share, calls, ranks.size)
        choices, ledger = by_score(method, consumers[path], share), Ledger(ranks, journal)
        decision = calibrate(method, consumers[path], choices, calls, ledger, within)
        if not path:
            decision.notes.extend(subject.notes)
        yield path, decision
    if "" not in consumers:
        advance(1.0)  # the last parts may have stayed whole


def served_budget(subject: Subject, budget: Budget, analysis: Groups) -> Budget:
    """The budget without the groups of programs that the batches do not serve."""
    served = subject.served()
    paths = [path for path, part in subject.analyses.items() for _ in part.chosen]
    names = {group.name for group, path in zip(analysis.chosen, paths, strict=True) if path in served}
    advice, budget = budget.advice, budget.only([group.name in names for group in budget.groups])
    budget.advice = advice
    if not budget.groups:
        raise NothingPrunableError("no group can be pruned of the parts that the calibration data serve")
    return budget


def _checked_costs(costs: Costs | None, method: Method, fingerprint: Callable[[], str]) -> Costs | None:
    """Cost curves that were measured before, if the allocation wants them and they are of this model.

    Raises:
        ArgumentError: they cannot be used.
    """
    if costs is not None:
        config = method.config
        key_of(config.effective_score, "score=", "costs=")
        if not method.needs_costs:
            raise ArgumentError(
                "costs= is for an allocation by predicted losses, and this one is uniform; leave it out, or"
                " pass allocation='global'"
            )
        check_costs(costs, fingerprint(), config.score_name, config.granularity)
    return costs


def _consumers(subject: Subject, config: PruningConfig) -> dict[str, Consumers]:
    """Those of the programs that the batches serve."""
    return {
        path: Consumers(subject.analyses[path], config.restore is not None, path) for path in subject.served()
    }


def measure_subject(
    subject: Subject, config: PruningConfig, calibration: Iterable[Any], job: Job, part: int | None
) -> Costs:
    """The cost curves of a model; errors as for :func:`fasp_fx.measure`.

    Args:
        part: one in so many sequences is run; ``None``: as many as a pruning runs.
    """
    asked = config
    if not Method.of(config).needs_costs:
        config = replace(
            config, sparsity=None if config.budget else config.target_sparsity, allocation="global"
        )
    check_weights(subject.programs.values())
    analysis = subject.analyze(config)
    batches, fingerprint = subject.read(calibration), subject.fingerprint()
    job.ranks.check_alike(lambda: fingerprint, batches, vars(config))
    inputs = functools.partial(subject.inputs, batches=batches)
    measurement = Measurement(_consumers(subject, config), inputs, job.ranks, wants_curves=True, part=part)
    measured = measurement.run(Method.of(config, job.loss), advance_of(job.progress))
    costs = measured.costs(fingerprint)
    costs.in_words = measured.method.in_words

    def point_at(costs: Costs, wanted: float | Cap) -> Point:
        lost = [0] * len(analysis.chosen)
        if wanted:
            config = asking(asked, wanted)
            budget = served_budget(subject, open_budget(config, analysis, subject.count), analysis)
            lost = allocate(Method.of(config, job.loss), budget, costs)
        counts = [count * group.blocks for group, count in zip(analysis.chosen, lost, strict=True)]
        names = (group.name for group in analysis.chosen)
        return Point(
            subject.count(None).removed(counts),
            int(subject.count(Parameters(1.0)).used(counts)),
            _macs(subject, counts),
            costs.predicted(dict(zip(names, lost, strict=True))),
        )

    costs.point_at = point_at
    return costs


def _macs(subject: Subject, counts: list[int]) -> int | None:
    """The multiply-accumulates that stay; ``None`` where nobody can count those of an operator."""
    try:
        return int(subject.count(Macs(1.0)).used(counts))
    except BudgetError:
        return None


def asking(config: PruningConfig, wanted: float | Cap) -> PruningConfig:
    """The options with another sparsity, or another budget."""
    sparsity, budget = (None, wanted) if isinstance(wanted, Cap) else (wanted, ())
    return replace(config, sparsity=sparsity, budget=budget)


def restoring_config(config: PruningConfig, plan: Any, has_data: bool) -> PruningConfig:
    """How to restore behind a plan.

    Raises:
        ArgumentError: the plan is none, something else was asked for, or there are no data to do it with.
    """
    advice = "pass a PruningPlan (PruningPlan.from_json reads one that was written as text)"
    check_kind("plan", plan, PruningPlan, advice)
    if others := config.non_default_fields(("restore", "drift")):
        raise ArgumentError(f"the plan says what goes, so that {others[0]}= has nothing to say; leave it out")
    if not has_data and config.non_default_fields(()):
        raise ArgumentError("nothing is restored without data; give calibration=, or leave out how to")
    return PruningConfig.of(config, {"granularity": plan.granularity, "include": plan.include})


def replay(
    subject: Subject, plan: PruningPlan, config: PruningConfig, calibration: Iterable[Any] | None, job: Job
) -> Iterator[tuple[str, Decision]]:
    """What a plan takes of each program of a model, with what stays repaired where there are batches; as
    :func:`decide`.

    Raises:
        PlanError: the plan is for another model, or for other parts of it.
        CalibrationError: the batches do not fit.
    """
    advance, method = advance_of(job.progress), Method.of(config)
    subject.analyze(config)
    removed = {path: gone_of(part, subject.analyses[path]) for path, part in subject.apart(plan).items()}
    batches = None if calibration is None else subject.read(calibration)
    for number, (path, gone) in enumerate(removed.items()):
        analysis = subject.analyses[path]
        inputs = None if batches is None else subject.inputs(path, batches)
        consumers = Consumers(analysis, config.restore is not None, path)
        within = between(advance, number / len(removed), (number + 1) / len(removed))
        choices = {
            name: lambda _, places=places: places for name, places in places_of(analysis, gone).items()
        }
        decision = calibrate(method, consumers, choices, inputs or None, Ledger(job.ranks), within)
        if not path:
            decision.notes.extend(subject.notes)
        yield path, decision


def _checkpoint_folder(checkpoint: str | Path | None, config: PruningConfig) -> Path | None:
    """The folder of a run that is kept.

    Raises:
        StoreError: it holds something else.
        ArgumentError: an option is a function, of which it cannot be told whether it is the same.
    """
    if checkpoint is None:
        return None
    folder = path_of(checkpoint, "checkpoint").absolute()
    refuse_other(folder)
    for name in ("score", "restore", "loss"):
        key_of(getattr(config, name), f"{name}=", "checkpoint=")
    return folder


def _journal(
    folder: Path | None,
    consumers: Consumers,
    config: PruningConfig,
    lost: list[int],
    inputs: Batches | None,
    processes: int,
) -> Journal | None:
    """What is kept of the calibration of one program; what an allocation decides stands in it by itself, and
    which code of the user's it is, its ``key`` says.
    """
    if folder is None or inputs is None:
        return None
    code = [name for name in ("score", "restore", "allocation", "loss") if callable(getattr(config, name))]
    unnamed: dict[str, Any] = dict.fromkeys(code)
    options = json.loads(replace(config, **unnamed).to_json())
    options |= {name: getattr(config, name).key for name in code if name != "allocation"}
    run = {
        "model": running_fingerprint(consumers.analysis.program),
        "options": options,
        "what goes of each group": lost,
        "data": digest_of([*inputs, inputs.sources]),
        "processes": processes,  # on which rounding depends
    }
    return Journal(folder, run)


def _predicted(method: Method, costs: Costs, analysis: Groups, lost: list[int]) -> Prediction:
    """What costs say of an allocation."""
    rise = costs.predicted(dict(zip((group.name for group in analysis.chosen), lost, strict=True)))
    return Prediction(method.loss_description, rise, method.in_words(rise))


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
    if isinstance(model, Captured):
        check_given(model.device(), args, kwargs, **how)
    captured = model if isinstance(model, Captured) else capture_model(model, args, kwargs, run=run, **how)
    around = captured.in_parts
    if around is None:
        return Whole(captured.checked(), how["device"])
    if config is not None and config.loss not in ("auto", "outputs", None):
        raise ArgumentError(
            f"loss={config.loss!r} needs a model that is captured as a whole; leave it out to prune this one"
            " by its submodules"
        ) from around.error
    return InParts(around, model_copy(around.model) if captured is model else around.model)
