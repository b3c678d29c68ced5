"""Prune a generating model of transformers: one plan, carried out in every program that generation needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, Unpack, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.export import ExportedProgram

from .. import plan as plans
from .._captured import program_of
from .._exactness import UnsoundError, restricted
from .._observe._calibration import check_calibration
from .._observe._ranks import Ranks
from .._observe._visit import Decision, decided
from .._program import Program
from .._prune import Timings, choose, make_plan, rewrite
from .._result import Result
from .._store._graph_json import program_to_json
from .._undisturbed import check_default_device, in_usual_modes, one_at_a_time
from .._version import __version__
from .._warn import warn
from ..analysis import Analysis, analyze_program
from ..budgets import Latency
from ..config import PruningConfig, PruningOptions
from ..costs import Costs
from ..errors import ArgumentError, PlanError, VerificationError, VerificationWarning
from ..passes import split_fused
from ..plan import PlannedGroup, PruningPlan
from ..report import Report, make_report, notes_of, said_whole
from ._config import PrunedConfig
from ._flat import FlatProgram
from ._habits import Habits
from ._held import Parts, StoredProgram
from ._model import PrunedModel
from ._probe import check_served, habits_of
from ._stages import Stage, stages_of


@dataclass(frozen=True)
class Pruned:
    """What :func:`fasp_fx.hf.prune` returns.

    Attributes:
        model: the smaller model; generates, trains and saves like the original.
        plan: what was removed.
        report: what it cost; ``report.cache`` says how much narrower the key-value cache became.
        tokenizer: the tokenizer that was given, saved along with the model.
    """

    model: Any
    plan: PruningPlan
    report: Report
    tokenizer: Any = None

    def with_report(self, **fields: Any) -> Self:
        """The same, sharing its model, with some fields of its report replaced, which is saved along."""
        report = replace(self.report, **fields)
        if isinstance(self.model, PrunedModel):
            self.model.report = report
        return replace(self, report=report)

    def loading(self, folder: str | Path) -> list[str]:
        """Lines of Python that load the model from the folder it was saved in."""
        from ._card import loading as loading_pruned
        from ._plain_folder import loading

        return loading_pruned(self.model, str(folder)) if isinstance(self.model, PrunedModel) else loading(self.model, str(folder))

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write model and tokenizer to a new folder, whole or not at all.

        Args:
            folder: the folder to make.
            overwrite: replace an earlier save (and nothing else) of that name.

        Returns:
            The folder, as ``AutoModelForCausalLM.from_pretrained`` reads it once fasp_fx is imported.

        Raises:
            StoreError: the path is taken or cannot be written.
        """
        from ._folder import save
        from ._plain_folder import save_plain

        if not isinstance(self.model, PrunedModel):
            return save_plain(self.model, self.tokenizer, self.plan, self.report, folder, overwrite=overwrite)
        return save(self.model, Path(folder), self.tokenizer, overwrite=overwrite)


@one_at_a_time
@in_usual_modes
def prune(
    model: Any,
    tokenizer: Any = None,
    *,
    calibration: Iterable[Any] | None = None,
    config: PruningConfig | None = None,
    costs: Costs | None = None,
    plain: bool = False,
    device: torch.device | str | None = None,
    progress: Callable[[float], None] | None = None,
    on_analysis: Callable[[Analysis], None] | None = None,
    group: dist.ProcessGroup | None = None,
    checkpoint: str | Path | None = None,
    **options: Unpack[PruningOptions],
) -> Pruned:
    """Make a generating model of transformers smaller, so that it still generates; the caller's model is not touched.

    Args:
        model: a causal language model or an encoder-decoder, in evaluation mode.
        tokenizer: kept and saved with the result.
        calibration: an iterable of batches: token numbers ``[batch, tokens]``, or dicts with ``input_ids`` and, where needed, ``attention_mask``;
            for an encoder-decoder also ``decoder_input_ids``. Tokens that the mask hides enter neither scores nor repairs.
        config: the options; ``None``: the defaults.
        costs: as for :func:`fasp_fx.prune`; not with ``plain``.
        plain: keep to what the architecture's own configuration can say, and return a model of the original class.
        device: where to capture and calibrate; ``None``: the model's device.
        progress, on_analysis, group, checkpoint: as for :func:`fasp_fx.prune`.
        options: fields of :class:`fasp_fx.PruningConfig` (``sparsity=0.2``, ``score="fasp"``, …) in the place of those of ``config``; the padding mask is
            that of the batches.

    Returns:
        A :class:`Pruned`.

    Raises:
        ArgumentError: the model does not generate, or an option is not known.
        CaptureError: the model cannot be captured, or its program does not compute what the model does at some size.
        PlanError: the plan cannot be carried out in one of the programs.
        FaspError: see :func:`fasp_fx.prune`.
    """
    check_default_device()
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ArgumentError(f"tokenizer is a {type(tokenizer).__name__}; pass one of transformers, and batches as calibration=")
    if plain:
        from ._plain import prune_plain

        if costs is not None:
            raise ArgumentError("a plain checkpoint measures its own costs, field by field of its config; leave costs= out")
        shared: dict[str, Any] = {"device": device, "progress": progress, "on_analysis": on_analysis, "group": group, "checkpoint": checkpoint}
        found = prune_plain(model, calibration=calibration, config=config, **shared, **options)
        return Pruned(found.model, found.result.plan, found.report, tokenizer)
    stages = stages_of(model)
    if "padding_mask" in options:
        raise ArgumentError("padding_mask= is not for fasp_fx.hf.prune, which takes the mask of the batches; leave it out")
    masked = {"padding_mask": "attention_mask"} if "attention_mask" in stages.accepts else {}
    asked = PruningConfig.of(config, {**options, **masked})
    if any(isinstance(cap, Latency) for cap in asked.caps):
        raise ArgumentError("a latency is that of example inputs, which a model that generates has none of; give them to fasp_fx.prune, or another budget")
    if asked.needs_data:
        check_calibration(calibration)
    ranks, clock = Ranks(group), Timings()
    stage = stages.planned()
    program = _captured(stage, device)
    habits = habits_of(stages, program)
    where = None if device is None else torch.device(device)
    batches = None
    if calibration is not None:
        batches = stages.batches(calibration, FlatProgram.of(program.module).cache_sizes())
    analysis, decision = choose(
        program,
        asked,
        batches,
        device=where,
        progress=progress,
        on_analysis=on_analysis,
        costs=costs,
        loss="next-token",
        ranks=ranks,
        checkpoint=checkpoint,
        clock=clock,
    )
    others = stages.served()
    if others:
        served = [_served(other, device, asked) for other in others]
        decision, results, left = _in_all(served, _Planned(program, analysis, decision))
        plan = make_plan(program, analysis, decision)
        weights = _one_set(model, results)
        plan = replace(plan, result=plans.fingerprint({name: tensor for name, tensor in weights.items() if isinstance(tensor, nn.Parameter)}))
        before = program.parameters()
        report = make_report(analysis, plan, decision, before, weights, asked, clock.seconds, left)
        found_out = [note for other in served for note in results[other.name].report.notes[len(notes_of(other.analysis)) :]]
        report = replace(report, notes=tuple(dict.fromkeys([*report.notes, *found_out, *(said_whole(name, seen) for name, seen in left.items())])))
        report = replace(report, cache=next((found.report.cache for found in results.values() if found.report.cache is not None), None))
    else:
        planned = rewrite(program, analysis, decision, asked, clock)
        results, plan, report, weights = {stage.name: planned}, planned.plan, planned.report, _one_set(model, {stage.name: planned})
    programs = {name: _stored(result.program) for name, result in results.items()}
    parts = Parts(programs, weights, {name: _constants(result.program) for name, result in results.items()}, plan, report)
    made = _model(model, parts, habits)
    check_served(made, stages)
    return Pruned(made, plan, report, tokenizer)


def _captured(stage: Stage, device: torch.device | str | None) -> Program:
    return program_of(stage.model, (), dict(stage.example), state=stage.state, dynamic_shapes=None, device=device)


@dataclass(frozen=True)
class _Planned:
    """The program that a plan is made for, and what was decided for it."""

    program: Program
    analysis: Analysis
    decision: Decision


@dataclass(frozen=True)
class _Served:
    """One more program of the model, in which the plan is carried out."""

    name: str
    program: Program
    analysis: Analysis


def _served(stage: Stage, device: torch.device | str | None, config: PruningConfig) -> _Served:
    program = _captured(stage, device)
    for node in program.module.graph.find_nodes(op="get_attr"):
        if not node.users:  # weights of the other programs
            program.module.graph.erase_node(node)
    program = program.copy()  # holds what the graph looks up, and nothing else
    return _Served(stage.name, program, analyze_program(program, split_fused, config.granularity, config.include))


def _in_all(others: list[_Served], planned: _Planned) -> tuple[Decision, dict[str, Result], dict[str, str]]:
    """Carry a plan out in every program; a group that one of them cannot lose stays whole in all, since they share their weights.

    Returns:
        What really went, the results by name, and the groups left whole with what was seen.

    Raises:
        VerificationError: nothing that was planned can go.
    """
    left: dict[str, str] = {}
    while True:
        plan = make_plan(planned.program, planned.analysis, planned.decision)
        results: dict[str, Result] = {}
        try:
            for other in others:
                results[other.name] = _carried_out(other, plan, planned)
        except UnsoundError as error:
            faulty = _same_groups(error.left, other, plan, planned)
            kept = [group for group in decided(planned.analysis, planned.decision) if group.name not in faulty]
            if not faulty or not kept:
                raise VerificationError(f"the program '{other.name}' of the model cannot lose what the plan removes: {error}") from error
            left |= {name: f"in the program '{other.name}' {seen}" for name, seen in faulty.items()}
            planned = replace(planned, decision=restricted(planned.analysis, planned.decision, kept))
            continue
        for name, seen in left.items():
            warn(said_whole(name, seen), VerificationWarning)
        return planned.decision, results, left


def _carried_out(other: _Served, plan: PruningPlan, planned: _Planned) -> Result:
    """Take out of one more program what the plan says, with the same repaired weights.

    Raises:
        UnsoundError: the program is not exact without all of it.
    """
    try:
        gone = plans.gone_of(plan, other.analysis, partial=True)
    except PlanError as error:
        raise PlanError(f"the program '{other.name}' of the model cannot lose what the plan removes: {error}") from error
    canonical, names = planned.program.canonical(), other.analysis.program.aliases()
    weights = {}
    for own, aliases in names.items():
        same = {canonical.get(alias, alias) for alias in aliases} & planned.decision.weights.keys()
        if same:
            weights[own] = planned.decision.weights[same.pop()]
    return rewrite(other.program, other.analysis, Decision(gone, weights), None, Timings(), whole=True)


def _same_groups(faulty: Mapping[str, str], other: _Served, plan: PruningPlan, planned: _Planned) -> dict[str, str]:
    """The groups of the plan that share a channel with groups of another program, given by name with what was seen of them."""
    canonical = planned.program.canonical()

    def channels(group: PlannedGroup) -> set[tuple[str, int, int, int]]:
        parts = [*group.producers, *group.consumers]
        return {(canonical.get(p.name, p.name), p.dim, block, index) for p in parts for block, indices in enumerate(p.by_block()) for index in indices}

    gone = plans.gone_of(plan, other.analysis, partial=True)
    theirs = plans.planned([group for group in other.analysis.groups if group.name in faulty], gone, other.analysis)
    seen = {channel: faulty[group.name] for group in theirs for channel in channels(group)}
    return {group.name: seen[next(iter(both))] for group in plan.groups if (both := channels(group) & seen.keys())}


def _stored(program: ExportedProgram) -> StoredProgram:
    return StoredProgram(program_to_json(program), FlatProgram.of(program.module(check_guards=False)))


def _constants(program: ExportedProgram) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in program.constants.items() if isinstance(value, Tensor)}


def _one_set(model: nn.Module, results: dict[str, Result]) -> dict[str, Tensor]:
    """The weights of all programs, one tensor for all names that were tied in the original model.

    Raises:
        PlanError: two programs would need different weights of one name.
    """
    ties: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        ties.setdefault(id(parameter), []).append(name)
    tied = {name: names for names in ties.values() for name in names}
    found: dict[str, Tensor] = {}
    for program, result in results.items():
        for name, tensor in result.program.state_dict.items():
            held = found.get(name)
            if held is None:
                made: Any = tensor.detach()
                made = nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
                for alias in tied.get(name, [name]):
                    found[alias] = made
            elif held.shape != tensor.shape or not torch.equal(held, tensor):
                raise PlanError(f"the program '{program}' needs another '{name}' than those before it; such a model cannot be served")
    order = {name: index for index, name in enumerate(dict(model.state_dict()))}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def _model(original: Any, parts: Parts, habits: Habits) -> PrunedModel:
    from . import PrunedForCausalLM, PrunedForSeq2SeqLM

    config = original.config
    kind: Any = PrunedForSeq2SeqLM if config.is_encoder_decoder else PrunedForCausalLM
    made = kind(
        PrunedConfig(
            original=_plain(config.to_dict()),
            **asdict(habits),
            fasp_fx_version=__version__,
            is_encoder_decoder=bool(config.is_encoder_decoder),
            architectures=[kind.__name__],
            dtype=original.dtype,
        ),
        parts,
    )
    made.generation_config = copy.deepcopy(original.generation_config)
    made.name_or_path = original.name_or_path
    return cast(PrunedModel, made)


def _plain(value: Any) -> Any:
    """A configuration as JSON takes it."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


__all__ = ["Pruned", "prune"]
