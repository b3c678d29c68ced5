"""Prune a generating model of transformers: one plan, carried out in every program that generation needs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack, cast

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from fasp_fx import pruning
from fasp_fx.allocation import Cap, Costs
from fasp_fx.analysis import Analysis, PruningPlan, gone_of
from fasp_fx.base import (
    Page,
    Shown,
    __version__,
    check_callable,
    in_usual_modes,
    one_at_a_time,
    path_of,
    quiet_transformers,
    shows,
    with_values,
)
from fasp_fx.calibration import (
    Decision,
    HeldOut,
    all_of,
    as_calls,
    check_calibration,
    ended_together,
    sources_in,
)
from fasp_fx.capturing import Captured, Program, capture_whole, tied_names
from fasp_fx.errors import ArgumentError, NothingPrunableError, PlanError, VerificationError, first_line
from fasp_fx.passes import PrunedModule, fused_weights
from fasp_fx.pruning import (
    USUAL,
    FormatName,
    Granularity,
    Include,
    Method,
    PruningConfig,
    PruningOptions,
    Report,
    Result,
    Sweep,
    analyze_for,
    read_told,
    rewrite,
    sweep_by,
    with_agreement,
    write_told,
)
from fasp_fx.storage import new_save, parsing, read_json

from ._config import PrunedConfig, check_layers
from ._fields import check_equal
from ._folder import check_sums, describe, upload
from ._formats import build, example_of, prune_to
from ._gguf import keep_source
from ._model import PrunedForCausalLM, PrunedForSeq2SeqLM, PrunedModel
from ._program import FlatProgram, Parts, StoredProgram
from ._registry import OWN, PER_LAYER, format_in, format_of
from ._stages import CausalStages, Seq2SeqStages, check_served, convention_of, stages_of


@dataclass(frozen=True)
class Pruned(Page):
    """What :func:`fasp_fx.hf.prune` returns.

    Attributes:
        model: the smaller model; generates, trains and saves like the original.
        plan: what was removed.
        report: what it cost; ``report.cache`` says how much narrower the key-value cache became.
        tokenizer: the tokenizer that was given, saved along with the model.
        format: of the files that it is saved in.

    Examples:
        >>> pruned.model.generate(texts[0][:, :4], max_new_tokens=2, min_new_tokens=2).shape
        torch.Size([4, 6])
        >>> folder = pruned.save_pretrained("small")
        >>> isinstance(fasp_fx.load("small"), hf.Pruned)
        True
    """

    model: Any
    plan: PruningPlan
    report: Report
    tokenizer: Any = None
    format: FormatName = OWN.name

    def with_report(self, **fields: Any) -> Self:
        """The same, sharing its model, with some fields of its report replaced, which is saved along."""
        report = self.report.with_fields(fields, self.model)
        if isinstance(self.model, PrunedModel):
            self.model.report = report
        return replace(self, report=report)

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write model and tokenizer to a new folder, whole or not at all.

        Args:
            folder: the folder to make.
            overwrite: replace an earlier save (and nothing else) of that name.

        Returns:
            The folder, as ``AutoModelForCausalLM.from_pretrained`` reads it: once fasp_fx.hf is imported,
            with ``trust_remote_code=True`` where layers have sizes of their own, and as it is where not.
            A format of GGUF files has ``model.gguf`` in it besides.

        Raises:
            StoreError: the path is taken or cannot be written.
            ArgumentError: a GGUF file cannot hold the tokenizer, or a weight in its type.
        """
        form, path = format_of(self.format), path_of(folder, "folder").absolute()
        with new_save(path, form.folder, overwrite=overwrite) as target, quiet_transformers():
            form.write(target, self.model, self.tokenizer)
            report = self.report.without_stale(self.model)
            write_told(target, self.plan, report)
            describe(target, self.model, report, path)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(str(target))
                keep_source(self.tokenizer, target)
        return path

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Put the files of :meth:`save_pretrained`, with their card, on the hub.

        Args:
            repo_id: the repository, which is made where there is none.
            options: ``private``, ``token``, ``revision``, ``commit_message``, ``create_pr``, … as for a model
                of transformers.

        Returns:
            The address of the commit.
        """
        return upload(self.save_pretrained, repo_id, **options)


@dataclass(frozen=True)
class CapturedModel:
    """A generating model as the programs that generation needs, over its own weights, for several prunings.

    Attributes:
        model: the caller's.
        programs: by name; a plan is made for the first of them, and carried out in all others.

    Examples:
        >>> list(captured_llama.programs)  # those that generation needs
        ['decode']
    """

    model: Any
    programs: Mapping[str, Captured]
    stages: CausalStages | Seq2SeqStages = field(repr=False)
    convention: Mapping[str, Any] = field(repr=False)

    @property
    def planned(self) -> Captured:
        """What plans are made for."""
        return next(iter(self.programs.values()))

    def read(self, calibration: Iterable[Any] | None) -> HeldOut:
        """Calibration batches as the planned program takes them.

        Raises:
            CalibrationError: they are none.
        """
        sizes = FlatProgram.of(self.planned.program.module).cache_sizes
        return all_of(check_calibration(calibration)).through(lambda some: self.stages.batches(some, sizes))


@one_at_a_time
@in_usual_modes
def capture(model: Any, *, device: torch.device | str | None = None) -> CapturedModel:
    """Capture a generating model of transformers once, for several analyses and prunings.

    Args:
        model: a causal language model or an encoder-decoder, in evaluation mode; its weights are shared.
        device: as for :func:`prune`.

    Raises:
        ArgumentError: the model does not generate.
        CaptureError: the model cannot be captured.

    Examples:
        >>> hf.capture(llama).model is llama
        True
    """
    stages = stages_of(model)
    programs = {
        stage.name: capture_whole(stage.model, (), dict(stage.example), state=stage.state, device=device)
        for stage in stages.programs()
    }
    return CapturedModel(
        model, programs, stages, convention_of(stages, next(iter(programs.values())).program)
    )


@one_at_a_time
@in_usual_modes
def analyze(
    model: Any,
    *,
    granularity: Collection[Granularity] = PruningConfig.granularity,
    include: Collection[Include] = (),
    device: torch.device | str | None = None,
) -> Analysis:
    """The coupled groups of a generating model, as :func:`fasp_fx.analyze`.

    Args:
        model, device: as for :func:`prune`.
        granularity, include: as for :func:`fasp_fx.prune`.

    Examples:
        >>> [group.name for group in hf.analyze(captured_llama).groups if group.status == "prunable"]
        ['model.layers.0.self_attn.o_proj.weight', 'model.layers.0.mlp.down_proj.weight']
    """
    return cast(
        Analysis, pruning.analyze(_captured(model, device).planned, granularity=granularity, include=include)
    )


@shows("measuring")
@one_at_a_time
@in_usual_modes
@ended_together
def measure(
    model: Any,
    *,
    calibration: Iterable[Any],
    config: PruningConfig | None = None,
    device: torch.device | str | None = None,
    progress: Shown = None,
    group: dist.ProcessGroup | None = None,
    part: int | None = 1,
    **options: Unpack[PruningOptions],
) -> Costs:
    """Predict what each coupled group of a generating model costs, as :func:`fasp_fx.measure`; arguments as
    for :func:`prune`.

    Examples:
        >>> costs = hf.measure(captured_llama, calibration=texts)
        >>> cheaper = hf.prune(captured_llama, calibration=texts, sparsity=0.3, costs=costs)
    """
    check_calibration(calibration)
    captured, asked = _captured(model, device), PruningConfig.of(config, options)
    return pruning.measure(
        captured.planned,
        calibration=captured.read(calibration),
        config=_by_next_token(asked),
        device=device,
        progress=progress,
        group=group,
        part=part,
    )


@shows("sweeping")
@one_at_a_time
@in_usual_modes
def sweep(
    model: Any,
    *,
    calibration: Iterable[Any],
    at: Iterable[float | Cap] = USUAL[0],
    measured_at: Iterable[float | Cap] = USUAL[1],
    config: PruningConfig | None = None,
    device: torch.device | str | None = None,
    progress: Shown = None,
    held_out: Iterable[Any] | None = None,
    **options: Unpack[PruningOptions],
) -> Sweep:
    """Predict what removing more and more of a generating model would cost, as :func:`fasp_fx.sweep`; model,
    batches and device as for :func:`prune`.

    Examples:
        >>> swept = hf.sweep(captured_llama, calibration=texts, at=(0.2, 0.4), measured_at=())
        >>> len(swept.points)
        3
    """
    captured, asked = _captured(model, device), PruningConfig.of(config, options)
    data, steps = HeldOut(calibration, held_out), (measure, partial(prune, format=OWN.name))
    return sweep_by(steps, captured, data, (at, measured_at), asked, progress)


@shows("pruning")
@one_at_a_time
@in_usual_modes
def apply(
    model: Any,
    plan: PruningPlan,
    tokenizer: Any = None,
    *,
    calibration: Iterable[Any] | None = None,
    config: PruningConfig | None = None,
    device: torch.device | str | None = None,
    progress: Shown = None,
    **options: Unpack[PruningOptions],
) -> Pruned:
    """Carry out a plan on the generating model it was made for, as :func:`fasp_fx.apply`.

    Args:
        model, tokenizer, device, progress: as for :func:`prune`.
        plan, calibration, config, options: as for :func:`fasp_fx.apply`.

    Examples:
        >>> again = hf.apply(captured_llama, pruned.plan, calibration=texts)
        >>> again.plan.groups == pruned.plan.groups
        True
    """
    captured = _captured(model, device)
    result = pruning.apply(
        captured.planned,
        plan,
        calibration=None if calibration is None else captured.read(calibration),
        config=config,
        device=device,
        progress=progress,
        **options,
    )
    return _served(captured, result, tokenizer)


@shows("pruning")
@one_at_a_time
@in_usual_modes
@ended_together
def prune(
    model: Any,
    tokenizer: Any = None,
    *,
    calibration: Iterable[Any] | None = None,
    config: PruningConfig | None = None,
    costs: Costs | None = None,
    format: FormatName | None = None,
    device: torch.device | str | None = None,
    progress: Shown = None,
    on_analysis: Callable[[Analysis], None] | None = None,
    group: dist.ProcessGroup | None = None,
    checkpoint: str | Path | None = None,
    held_out: Iterable[Any] | None = None,
    **options: Unpack[PruningOptions],
) -> Pruned:
    """Make a generating model of transformers smaller, so that it still generates; the caller's model is not
    touched.

    Args:
        model: a causal language model or an encoder-decoder, in evaluation mode; or what :func:`capture` made
            of one.
        tokenizer: kept and saved with the result.
        calibration: an iterable of batches: token numbers ``[batch, tokens]``, or dicts with ``input_ids``
            and, where needed, ``attention_mask``; for an encoder-decoder also ``decoder_input_ids``. Tokens
            that the mask hides enter neither scores nor repairs. Of several sources by their names, each
            counts for as much. Where there is no text, :func:`write_texts` gives some.
        config: the options; ``None``: the defaults.
        costs: as for :func:`fasp_fx.prune`.
        format: of the files that the result is to be saved in. ``"fasp-fx"``: the pruned program, for any
            model. The others hold less, and the model that is returned is one of transformers:
            ``"per-layer"``, of the original class, with layers of their own sizes; ``"plain"``, of the
            original class, with equal layers; ``"gguf"``, ``"gguf-q8_0"``, … and ``"decilm"``, a Llama with
            layers of their own sizes (docs/formats.md). ``None``: ``"per-layer"`` where the class can say
            whatever can be pruned and costs choose, and else ``"fasp-fx"``; the report says why.
        device: where to capture and calibrate; ``None``: the model's device.
        progress, on_analysis, group, checkpoint, held_out: as for :func:`fasp_fx.prune`.
        options: fields of :class:`fasp_fx.PruningConfig` (``sparsity=0.2``, ``score="fasp"``, …) in the place
            of those of ``config``.

    Returns:
        A :class:`Pruned`.

    Raises:
        ArgumentError: the model does not generate, or an option is not known.
        CaptureError: the model cannot be captured, or its program does not compute what the model does at
            some size.
        PlanError: the plan cannot be carried out in one of the programs.
        FaspError: see :func:`fasp_fx.prune`.

    Examples:
        >>> pruned = hf.prune(captured_llama, calibration=texts, sparsity=0.2)  # or of the model itself
        >>> pruned.report.parameters
        (3632, 3056)
    """
    check_callable(on_analysis=on_analysis)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ArgumentError(
            f"tokenizer is a {type(tokenizer).__name__}; pass one of transformers, and batches as"
            " calibration="
        )
    asked, data = PruningConfig.of(config, options), HeldOut(calibration, held_out)
    passed: dict[str, Any] = {
        "costs": costs,
        "progress": progress,
        "on_analysis": on_analysis,
        "group": group,
        "checkpoint": checkpoint,
    }
    notes: tuple[str, ...] = ()
    if format is None and (costs is not None or isinstance(model, CapturedModel)):
        format = OWN.name  # what costs and captures are of
    elif format is None and not Method.of(asked).needs_costs:
        format = OWN.name
        notes = (f"the model is a program ({OWN.name!r}): without costs, heads would go from every layer",)
    batches = None if calibration is None else data.through(_without_labels)
    if format != OWN.name:
        try:
            done = prune_to(format, model, tokenizer, batches, asked, device, **passed)
            return _measured(Pruned(*done, tokenizer, format or PER_LAYER.name), model, data)
        except (ArgumentError, NothingPrunableError) as error:
            if format is not None:
                raise
            notes = (f"the model is a program ({OWN.name!r}): {first_line(error)}",)
    captured = _captured(model, device)
    result = pruning.prune(
        captured.planned,
        calibration=captured.read(batches) if Method.of(asked).needs_data else None,
        config=_by_next_token(asked),
        device=device,
        held_out=(),
        **passed,
    )
    report = {"config": asked, "notes": (*notes, *result.report.notes)}
    pruned = _served(captured, result.with_report(**report), tokenizer)
    return _measured(pruned, captured.model, data)


def _without_labels(batches: Iterable[Any]) -> Iterator[Any]:
    """What the model needs to compute logits, of batches as a trainer takes them."""
    for args, kwargs in as_calls(batches):
        yield {name: value for name, value in kwargs.items() if name != "labels"} or args


def _measured(pruned: Pruned, dense: Any, data: HeldOut) -> Pruned:
    """The same, with how far it agrees with the dense model in its report."""

    def called(batches: Any) -> list[dict[str, Any]]:
        calls = as_calls([*_without_labels(batches)], "held_out") if batches else ()
        return [{**(kwargs or {"input_ids": args[0]}), "use_cache": False} for args, kwargs in calls]

    rows = {source: called(some) for source, some in sources_in(data.rows).items()}
    return cast(Pruned, with_agreement(pruned, dense, pruned.model, rows.get("", rows)))


def _captured(model: Any, device: torch.device | str | None) -> CapturedModel:
    return model if isinstance(model, CapturedModel) else capture(model, device=device)


def _by_next_token(config: PruningConfig) -> PruningConfig:
    """The options, where ``loss="auto"`` stands for that of the next token."""
    return replace(config, loss="next-token") if config.loss == "auto" else config


def _served(captured: CapturedModel, result: Result, tokenizer: Any) -> Pruned:
    """Carry out in all programs what was decided for the first, with its weights."""
    model, plan, report = captured.model, result.plan, result.report
    first, *others = captured.programs
    # Others are what generation runs in the place of the first.
    results = {name: _carried_out(name, captured.programs[name].checked(), plan) for name in others} or {
        first: result
    }
    reports = [other.report for other in results.values()]
    report = replace(
        report,
        notes=tuple(dict.fromkeys(note for each in (report, *reports) for note in each.notes)),
        cache=next((each.cache for each in reports if each.cache is not None), None),
    )
    programs: dict[str, StoredProgram] = {}
    constants: dict[str, dict[str, Tensor]] = {}
    for name, other in results.items():
        origin = cast(PrunedModule, other.module).fasp_fx_origin
        programs[name] = StoredProgram(origin, FlatProgram.of_graph(*origin.body()))
        stored = other.module.state_dict().keys()
        constants[name] = {
            buffer: value.detach()
            for buffer, value in other.module.named_buffers(remove_duplicate=False)
            if buffer not in stored
        }
    parts = Parts(programs, _one_set(model, {first: result, **results}), constants, plan, report)
    smaller = _model(model, parts, captured.convention)
    check_served(smaller, captured.stages)
    return Pruned(smaller, plan, report, tokenizer)


def _model(original: Any, parts: Parts, convention: Mapping[str, Any]) -> PrunedModel:
    config = original.config
    kind: Any = PrunedForSeq2SeqLM if config.is_encoder_decoder else PrunedForCausalLM
    model = kind(
        PrunedConfig(
            original=json.loads(config.to_json_string(use_diff=False))
            | {"architectures": [type(original).__name__]},
            **convention,
            fasp_fx_version=__version__,
            is_encoder_decoder=bool(config.is_encoder_decoder),
            architectures=[kind.__name__],
            dtype=original.dtype,
        ),
        parts,
    )
    model.generation_config = copy.deepcopy(original.generation_config)
    model.name_or_path = original.name_or_path
    return cast(PrunedModel, model)


def _carried_out(name: str, program: Program, plan: PruningPlan) -> Result:
    """Take out of one more program what the plan says, with nothing repaired.

    Raises:
        PlanError: the program does not have what goes.
        VerificationError: it is not exact without all of it.
    """
    program = program.copy()
    for node in program.module.graph.find_nodes(op="get_attr"):
        if not node.users:  # weights of the other programs
            program.module.graph.erase_node(node)
    program = program.copy()  # holds what the graph looks up, and nothing else
    analysis = analyze_for(program, plan)
    try:
        result = rewrite(program, analysis, Decision(gone_of(plan, analysis, partial=True)), whole=True)
        if not set(result.plan.splits) <= set(plan.splits):
            raise PlanError("it takes weights apart in another way")
        return result
    except (PlanError, VerificationError) as error:
        raise type(error)(
            f"the program '{name}' of the model cannot lose what the plan removes: {error}; leave that"
            " whole with exclude=, or prune with fasp_fx.prune"
        ) from error


def _one_set(model: nn.Module, results: Mapping[str, Result]) -> dict[str, Tensor]:
    """The weights of all programs, those of the first where it has them, one tensor for all names that were
    tied in the original model. What goes of a weight in another program is a part of what goes in the first,
    so that those of one shape are cut alike.

    Raises:
        PlanError: two programs would need different weights of one name.
    """
    tied = tied_names(model)
    weights: dict[str, Tensor] = {}
    for program, result in results.items():
        for name, tensor in result.module.state_dict(keep_vars=True).items():
            if name not in weights:
                weights |= dict.fromkeys(tied.get(name, [name]), with_values(tensor, tensor))
            elif weights[name].shape != tensor.shape:
                raise PlanError(
                    f"the program '{program}' needs another '{name}' than those before it; such a model"
                    " cannot be served"
                )
    order = {name: index for index, name in enumerate(dict(model.state_dict()))}
    return dict(sorted(weights.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def convert(pruned: Pruned, format: FormatName) -> Pruned:
    """Put a pruned model into another format, which has to be able to hold what was pruned.

    Args:
        pruned: as :func:`prune` or :func:`fasp_fx.load` returned it.
        format: as for :func:`prune`; not ``"fasp-fx"``.

    Raises:
        ArgumentError: the format is not known, or cannot hold the model; names the weight.
        VerificationError: the model that was built does not compute what the pruned one does.

    Examples:
        >>> plain = hf.convert(pruned, "per-layer")
        >>> type(plain.model).__name__
        'PerLayerLlamaForCausalLM'
    """
    form, model = format_of(format), pruned.model
    if form is OWN:
        raise ArgumentError(f"nothing is converted to {format!r}, which prune writes; give another format")
    kind, config = format_of(pruned.format).dense(model)
    experiments = form.experiments(kind, config)
    weights = model.state_dict(keep_vars=True)
    weights |= fused_weights(pruned.plan, weights)
    if experiments.kind is kind:
        weights = {name: weights[name] for name in experiments.shapes if name in weights}
    smaller, _ = build(
        format, experiments, {name: weight.detach() for name, weight in weights.items()}, model
    )
    check_equal(smaller, model, example_of(model))
    report = pruned.report.without_stale(model)
    converted = replace(pruned, model=smaller, format=format, report=report)
    return converted.with_report(agreement=report.agreement)


def read_pruned(folder: Path, device: torch.device | None) -> Pruned:
    """A pruned model as :func:`fasp_fx.hf.prune` returned it, from a folder of any format, with its tokenizer
    if there is one.

    Raises:
        StoreError: a file is missing, damaged or of another version.
    """
    check_sums(folder)
    check_layers(read_json(folder / "config.json"))  # it may be anybody's
    tokenizer = None
    if (folder / "tokenizer_config.json").is_file():
        with parsing("tokenizer_config.json"):
            # Without the option it asks at the terminal whether to run the code that is saved along.
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    form, kind = format_in(folder)
    return Pruned(form.load(kind, folder, device), *read_told(folder), tokenizer, form.name)
