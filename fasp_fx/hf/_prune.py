"""Prune a generating model of transformers: one plan, carried out in every program that generation needs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, Unpack, cast

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from fasp_fx.allocation import Costs
from fasp_fx.analysis import Analysis, PruningPlan, gone_of
from fasp_fx.base import Shown, __version__, check_callable, in_usual_modes, one_at_a_time, shows
from fasp_fx.calibration import Decision, Ranks, check_calibration, ended_together
from fasp_fx.capturing import Captured, Program, capture_whole
from fasp_fx.errors import ArgumentError, PlanError, StoreError, VerificationError
from fasp_fx.passes import PrunedModule
from fasp_fx.pruning import (
    FormatName,
    Granularity,
    Include,
    PruningConfig,
    PruningOptions,
    Report,
    Result,
    Subject,
    analyze_for,
    decide,
    fused_weights,
    measure_subject,
    read_told,
    replay,
    restoring_config,
    rewrite,
)
from fasp_fx.storage import kind_of, parsing, read_json

from . import modeling_per_layer
from ._claims import check_equal, refuse_unsaid
from ._config import PrunedConfig, check_layers, original_of
from ._convention import check_served, convention_of
from ._flat import FlatProgram
from ._folder import KIND, OWN, check_sums, save
from ._formats import BY_LAYER, build, example_of, experiments_for, format_of, prune_to
from ._generating import PrunedForCausalLM, PrunedForSeq2SeqLM
from ._model import Parts, PrunedModel, StoredProgram
from ._stages import CausalStages, Seq2SeqStages, stages_of


@dataclass(frozen=True)
class Pruned:
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
    format: FormatName = OWN

    def with_report(self, **fields: Any) -> Self:
        """The same, sharing its model, with some fields of its report replaced, which is saved along."""
        report = replace(self.report, **fields)
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
        told = self.plan, self.report
        return save(self.model, self.tokenizer, *told, folder, format=self.format, overwrite=overwrite)


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

    def planned(self) -> tuple[str, Program]:
        """The program that plans are made for, and its name.

        Raises:
            ArgumentError: a weight has changed since the capture.
        """
        name = next(iter(self.programs))
        return name, self.programs[name].checked()

    def read(self, calibration: Iterable[Any] | None) -> Any:
        """Calibration batches as the planned program takes them."""
        if calibration is None:
            return None
        return self.stages.batches(calibration, FlatProgram.of(self.planned()[1].module).cache_sizes())


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
    programs: dict[str, Captured] = {}
    for stage in stages.programs():
        programs[stage.name] = capture_whole(
            stage.model, (), dict(stage.example), state=stage.state, device=device
        )
    convention = convention_of(stages, next(iter(programs.values())).program)
    return CapturedModel(model, programs, stages, convention)


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
    config = PruningConfig(granularity=granularity, include=include)
    return Subject({"": _captured(model, device).planned()[1]}).analyze(config)


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
    **options: Unpack[PruningOptions],
) -> Costs:
    """Predict what each coupled group of a generating model costs, as :func:`fasp_fx.measure`; arguments as
    for :func:`prune`.

    Examples:
        >>> costs = hf.measure(captured_llama, calibration=texts)
        >>> cheaper = hf.prune(captured_llama, calibration=texts, sparsity=0.3, costs=costs)
    """
    check_calibration(calibration)
    captured = _captured(model, device)
    asked = PruningConfig.of(config, options)
    return measure_subject(
        Subject({"": captured.planned()[1]}, device),
        asked,
        captured.read(calibration),
        ranks=Ranks.of(group),
        progress=progress,
        loss="next-token",
    )


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
    asked = restoring_config(PruningConfig.of(config, options), plan, calibration is not None)
    captured = _captured(model, device)
    subject = Subject({"": captured.planned()[1]}, device)
    batches = captured.read(calibration)
    ((_, decision),) = replay(subject, plan, asked, batches, progress=progress)
    return _finished(captured, subject, decision, asked, None, tokenizer)


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
    format: FormatName = OWN,
    device: torch.device | str | None = None,
    progress: Shown = None,
    on_analysis: Callable[[Analysis], None] | None = None,
    group: dist.ProcessGroup | None = None,
    checkpoint: str | Path | None = None,
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
            that the mask hides enter neither scores nor repairs.
        config: the options; ``None``: the defaults.
        costs: as for :func:`fasp_fx.prune`.
        format: of the files that the result is to be saved in. ``"fasp-fx"``: the pruned program, for any
            model. The others hold less, and the model that is returned is one of transformers:
            ``"per-layer"``, of the original class, with layers of their own sizes; ``"plain"``, of the
            original class, with equal layers; ``"gguf"``, ``"gguf-q8_0"``, … and ``"decilm"``, a Llama with
            layers of their own sizes (docs/formats.md).
        device: where to capture and calibrate; ``None``: the model's device.
        progress, on_analysis, group, checkpoint: as for :func:`fasp_fx.prune`.
        options: fields of :class:`fasp_fx.PruningConfig` (``sparsity=0.2``, ``score="fasp"``, …) in the place
            of those of ``config``; the padding mask is that of the batches.

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
        (3632, 3104)
    """
    check_callable(on_analysis=on_analysis)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ArgumentError(
            f"tokenizer is a {type(tokenizer).__name__}; pass one of transformers, and batches as"
            " calibration="
        )
    if format != OWN:
        shared: dict[str, Any] = {
            "costs": costs,
            "device": device,
            "progress": progress,
            "on_analysis": on_analysis,
            "group": group,
            "checkpoint": checkpoint,
            "tokenizer": tokenizer,
        }
        held = prune_to(format, model, calibration=calibration, config=config, **shared, **options)
        return Pruned(*held, tokenizer, format)
    captured = _captured(model, device)
    asked = PruningConfig.of(config, options)
    if asked.needs_data:
        check_calibration(calibration)
    subject = Subject({"": captured.planned()[1]}, device)
    ((_, decision),) = decide(
        subject,
        asked,
        captured.read(calibration),
        progress=progress,
        on_analysis=on_analysis,
        costs=costs,
        loss="next-token",
        ranks=Ranks.of(group),
        checkpoint=checkpoint,
    )
    return _finished(captured, subject, decision, asked, asked, tokenizer)


def _captured(model: Any, device: torch.device | str | None) -> CapturedModel:
    return model if isinstance(model, CapturedModel) else capture(model, device=device)


def _finished(
    captured: CapturedModel,
    subject: Subject,
    decision: Decision,
    asked: PruningConfig,
    config: PruningConfig | None,
    tokenizer: Any,
) -> Pruned:
    """Carry out in all programs what was decided for the first.

    Args:
        config: what was asked for; ``None`` where a plan is replayed.
    """
    model, (name, program) = captured.model, captured.planned()
    analysis = subject.analyses[""]
    _, *others = [(name, one.checked()) for name, one in captured.programs.items()]
    result = rewrite(program, analysis, decision, config)
    results, plan, report = {name: result}, result.plan, result.report
    if others:  # which generation runs in the place of the first
        results = {name: _carried_out(name, other, asked, plan, program, decision) for name, other in others}
        reports = [result.report for result in results.values()]
        notes = dict.fromkeys(note for one in (report, *reports) for note in one.notes)
        cache = next((one.cache for one in reports if one.cache is not None), None)
        report = replace(report, notes=tuple(notes), cache=cache)
    programs: dict[str, StoredProgram] = {}
    constants: dict[str, dict[str, Tensor]] = {}
    for name, result in results.items():
        origin = cast(PrunedModule, result.module).fasp_fx_origin
        programs[name] = StoredProgram(origin, FlatProgram.of_graph(*origin.body()))
        stored = result.module.state_dict().keys()
        buffers = result.module.named_buffers(remove_duplicate=False)
        constants[name] = {name: value.detach() for name, value in buffers if name not in stored}
    parts = Parts(programs, one_set(model, results), constants, plan, report)
    made = _model(model, parts, captured.convention)
    check_served(made, captured.stages)
    return Pruned(made, plan, report, tokenizer)


def _model(original: Any, parts: Parts, convention: Mapping[str, Any]) -> PrunedModel:
    config = original.config
    kind: Any = PrunedForSeq2SeqLM if config.is_encoder_decoder else PrunedForCausalLM
    made = kind(
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
    made.generation_config = copy.deepcopy(original.generation_config)
    made.name_or_path = original.name_or_path
    return cast(PrunedModel, made)


def _carried_out(
    name: str, other: Program, asked: PruningConfig, plan: PruningPlan, program: Program, decision: Decision
) -> Result:
    """Take out of one more program what the plan says, with the same repaired weights.

    Raises:
        PlanError: the program does not have what goes.
        VerificationError: it is not exact without all of it.
    """
    other = other.copy()
    for node in other.module.graph.find_nodes(op="get_attr"):
        if not node.users:  # weights of the other programs
            other.module.graph.erase_node(node)
    other = other.copy()  # holds what the graph looks up, and nothing else
    analysis = analyze_for(other, asked)
    canonical, names = program.canonical(), analysis.program.aliases()
    weights = {}
    for own, aliases in names.items():
        same = {canonical.get(alias, alias) for alias in aliases} & decision.weights.keys()
        if same:
            weights[own] = decision.weights[same.pop()]
    try:
        gone = gone_of(plan, analysis, partial=True)
        return rewrite(other, analysis, Decision(gone, weights), whole=True)
    except (PlanError, VerificationError) as error:
        raise type(error)(
            f"the program '{name}' of the model cannot lose what the plan removes: {error}; leave that"
            " whole with exclude=, or prune with fasp_fx.prune"
        ) from error


def one_set(model: nn.Module, results: dict[str, Result]) -> dict[str, Tensor]:
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
        for name, tensor in result.module.state_dict(keep_vars=True).items():
            if name not in found:
                made = tensor.detach()
                if isinstance(tensor, nn.Parameter):
                    made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                found |= dict.fromkeys(tied.get(name, [name]), made)
            elif not torch.equal(found[name], tensor):
                raise PlanError(
                    f"the program '{program}' needs another '{name}' than those before it; such a model"
                    " cannot be served"
                )
    order = {name: index for index, name in enumerate(dict(model.state_dict()))}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


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
    kind, config = dense_of(model)
    experiments = experiments_for(format, kind, config)
    if form.as_llama:
        refuse_unsaid(format, kind, config)
    held = model.state_dict(keep_vars=True)
    made = held | fused_weights(pruned.plan, held)
    own = (
        made
        if experiments.kind is not kind
        else {key: made[key] for key in experiments.shapes if key in made}
    )
    smaller, _ = build(format, experiments, {key: tensor.detach() for key, tensor in own.items()}, model)
    check_equal(smaller, model, example_of(model))
    return replace(pruned, model=smaller, format=format)


def dense_of(model: Any) -> tuple[Any, Any]:
    """The class of a dense model and its configuration, of which ``model`` is what is left.

    Raises:
        ArgumentError: its class is not one of transformers'.
    """
    kind: Any = type(model)
    config = model.config
    if isinstance(model, PrunedModel):
        config = original_of(config)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
    elif kind.__module__ == modeling_per_layer.__name__:
        kind = kind.__bases__[1]
        said = json.loads(config.to_json_string(use_diff=False))
        config = kind.config_class.from_dict({key: said[key] for key in said if key not in BY_LAYER})
    if kind is None:
        raise ArgumentError("the model's class is not one of transformers'; it stays as it is")
    return kind, config


def read_pruned(folder: Path, device: torch.device | None) -> Pruned:
    """A pruned model as :func:`fasp_fx.hf.prune` returned it, from a folder of either kind, with its
    tokenizer if there is one.

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
    if kind_of(folder) == KIND:
        with parsing("config.json"):
            config = PrunedConfig.from_pretrained(folder)
        kind = PrunedForSeq2SeqLM if config.is_encoder_decoder else PrunedForCausalLM
        model = kind.from_pretrained(folder, device_map=device)
        return Pruned(model, model.plan, model.report, tokenizer)
    plan, report = read_told(folder)
    with parsing("config.json"):
        name = str((read_json(folder / "config.json").get("architectures") or ["none"])[0])
        found: Any = getattr(transformers, name, None) or getattr(modeling_per_layer, name, None)
        if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
            raise StoreError(f"config.json names the class {name!r:.80}, which transformers has not")
        options: dict[str, Any] = {"dtype": "auto", "device_map": device, "output_loading_info": True}
        model, info = cast(Any, found).from_pretrained(folder, **options)
    for what in sorted(str(key) for keys in info.values() for key in keys):
        raise StoreError(
            f"model.safetensors does not hold what config.json says, such as {what:.200}: weights would"
            " be made up or left out; save the model again"
        )
    own = found.__module__ == modeling_per_layer.__name__
    said: FormatName = "plain"
    if own:
        said = "decilm" if found is modeling_per_layer.DeciLMForCausalLM else "per-layer"
    return Pruned(model, plan, report, tokenizer, said)
