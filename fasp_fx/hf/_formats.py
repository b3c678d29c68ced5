"""Prune to what a format of model files can hold: what that is, how pruning keeps to it, and how the model is
built that is then written.
"""

from __future__ import annotations

import copy
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from fasp_fx.allocation import Allocation, Budget, Bytes, CostAllocation, Costs, Search, joined, validate
from fasp_fx.analysis import DEPTH, PRUNABLE, Analysis, PruningPlan
from fasp_fx.base import (
    Shown,
    attention_of,
    classes_by_config,
    device_of,
    forget_conversions,
    quiet_transformers,
    tolerable,
)
from fasp_fx.calibration import as_calls, check_calibration, ended_together
from fasp_fx.capturing import capture_whole
from fasp_fx.errors import ArgumentError, NothingPrunableError, SparsityError, first_line
from fasp_fx.pruning import Granularity, PruningConfig, PruningOptions, Report, Result, fused_weights, prune

from . import modeling_per_layer
from ._claims import check_equal, llama_of, refuse_unsaid, unlike
from ._fields import Experiments, Field, Path, arrange, find_fields, lowered, units, written
from ._gguf import bytes_each, describe_gguf

#: tokens of an example where there is no calibration data to take one from
_EXAMPLE = (2, 8)


@dataclass(frozen=True)
class Format:
    """What a format of model files can say of a model.

    Attributes:
        granularity: what is pruned unless the caller says.
        by_layer: whether each layer has sizes of its own, 0 for a block that is absent.
        fields: which fields of a config say them; ``None``: any that do.
        at_once: those of them that stay as they are, or are 0.
        as_llama: whether it is for models that compute what transformers' Llama does, whatever their class.
        multiple: widths are multiples of it.
        tensors: how a GGUF file holds matrices, by the name of the ``gguf`` package, or ``""`` as they are;
            ``None``: there is no such file.
    """

    granularity: tuple[Granularity, ...] = ("channel", "head")
    by_layer: bool = True
    fields: frozenset[str] | None = None
    at_once: frozenset[str] = frozenset()
    as_llama: bool = False
    multiple: int = 1
    tensors: str | None = None

    @property
    def stored(self) -> Callable[[Tensor], float] | None:
        """How many bytes its GGUF file takes for each number of a weight; ``None``: there is no such file."""
        return None if self.tensors is None else partial(bytes_each, tensors=self.tensors)


#: what a configuration has besides, where layers have sizes of their own
BY_LAYER = (
    "per_layer_config",
    "allow_global_per_layer_attribute_access",
    "block_configs",
    "auto_map",
    "model_type",
)
_HEADS = frozenset({"num_attention_heads", "num_key_value_heads"})
_SIZES = _HEADS | {"intermediate_size"}
_GGUF = Format(fields=_SIZES, as_llama=True, tensors="")

FORMATS: Mapping[str, Format] = {
    "plain": Format(("channel",), by_layer=False),
    "per-layer": Format(),
    "decilm": Format(("channel",), fields=_SIZES, at_once=_HEADS, as_llama=True),
    "gguf": _GGUF,
    "gguf-f16": replace(_GGUF, tensors="F16"),
    "gguf-bf16": replace(_GGUF, tensors="BF16"),
    # blocks of 32 numbers of a row
    "gguf-q8_0": replace(_GGUF, tensors="Q8_0", multiple=32),
    "gguf-q4_0": replace(_GGUF, tensors="Q4_0", multiple=32),
}


def format_of(name: str) -> Format:
    """A format by its name.

    Raises:
        ArgumentError: there is none; lists those that there are.
    """
    if name not in FORMATS:
        raise ArgumentError(f"format={name!r:.80} is not known; use {', '.join(map(repr, FORMATS))}")
    return FORMATS[name]


@ended_together
def prune_to(
    name: str,
    model: nn.Module,
    *,
    calibration: Iterable[Any] | None = None,
    config: PruningConfig | None = None,
    costs: Costs | None = None,
    device: torch.device | str | None = None,
    progress: Shown = None,
    on_analysis: Callable[[Analysis], None] | None = None,
    group: dist.ProcessGroup | None = None,
    checkpoint: str | pathlib.Path | None = None,
    tokenizer: Any = None,
    **options: Unpack[PruningOptions],
) -> tuple[PreTrainedModel, PruningPlan, Report]:
    """Prune a transformers model by what a format can say: the result is a model of transformers in that
    format, with the plan and the report.

    Which fields of the config shrink which groups is found by building the class at other sizes on the meta
    device. Groups that no field of the format shrinks are left whole; the report says why. The result is
    compared with the pruned program before it is handed out.

    Args:
        name: of the format.
        model: a transformers model in evaluation mode; it is left as it was.
        calibration, costs, device, progress, on_analysis, group, checkpoint: as for :func:`fasp_fx.prune`.
        tokenizer: that a GGUF file is to hold.
        config, options: as for :func:`fasp_fx.prune`, with one sparsity or budgets. An allocation sees one
            group for all that have one size.

    Raises:
        ArgumentError: the model is not one of transformers', its config does not describe it, or the format
            cannot hold it, its tokenizer, or what the options ask for.
        NothingPrunableError: the format can say nothing of it; the message says what stands in the way.
        SparsityError: it cannot say enough; the message says how much it can.
        VerificationError: the model that was built does not compute what the pruned program computes.
        CalibrationError, CaptureError: as for :func:`fasp_fx.prune`.
    """
    asked = PruningConfig.of(config, options)
    own, settings = config_for(name, model, asked)
    assert isinstance(model, PreTrainedModel)
    if asked.needs_data:
        check_calibration(calibration)
    calibration, example = _batches(model, calibration)
    # A program that returns a cache says how large it is.
    example["use_cache"] = asked.counts_cache
    form = FORMATS[name]
    # What the file cannot say is refused before the work.
    dense, _ = build(name, settings.experiments, model.state_dict(keep_vars=True), model)
    said = check_equal(dense, model, example)
    if form.tensors is not None:
        describe_gguf(pathlib.Path(), dense, form.tensors, tokenizer)
    result = prune(
        capture_whole(dense, (), example, device=device),
        calibration=calibration,
        config=own,
        costs=costs,
        progress=progress,
        on_analysis=on_analysis,
        group=group,
        checkpoint=checkpoint,
    )
    smaller, note = build(name, settings.experiments, smaller_weights(dense, result), model)
    check_equal(smaller, result.module, example)
    lines = tuple(
        replace(line, reason=f"left whole: {settings.whole[line.name]}")
        if line.status == PRUNABLE and line.name in settings.whole
        else line
        for line in result.report.lines
    )
    counted = Bytes(1.0, form.stored)
    # The settings are no allocation of the caller's.
    report = replace(
        result.report,
        bytes=(round(counted.held(model.parameters())), round(counted.held(smaller.parameters()))),
        lines=lines,
        notes=(note, *said, *result.report.notes),
        config=asked,
    )
    made: Any = smaller
    return made.to(device_of(model)), result.plan, report


def config_for(name: str, model: Any, asked: PruningConfig) -> tuple[PruningConfig, Settings]:
    """The configuration with which a model is pruned to a format.

    Raises:
        ArgumentError: as for :func:`prune_to`.
    """
    form = format_of(name)
    if not isinstance(model, PreTrainedModel):
        raise ArgumentError(
            f"format={name!r} is for models of transformers, not for a {type(model).__name__}"
        )
    for option, given in (
        ("include='depth'", DEPTH in asked.include and not form.by_layer),
        ("sparsity by pattern", isinstance(asked.sparsity, Mapping)),
        ("allocation by trial", isinstance(asked.allocator, Search)),
    ):
        if given:
            raise ArgumentError(
                f"{option} cannot be had in the format {name!r}, which says sizes of several weights at"
                " once; leave it out, or prune to 'fasp-fx'"
            )
    experiments = experiments_for(name, type(model), model.config)
    _check_names(name, experiments, model.state_dict())
    if form.as_llama:
        refuse_unsaid(name, type(model), model.config)
    kind = CostSettings if isinstance(asked.allocator, CostAllocation) else Settings
    settings = kind(name, experiments, asked.allocator)
    default = asked.granularity == PruningConfig.granularity
    # Attention goes with all of its heads.
    granularity = Format.granularity if DEPTH in asked.include else form.granularity
    own = replace(
        asked,
        budget=[
            replace(cap, stored=cap.stored or form.stored) if isinstance(cap, Bytes) else cap
            for cap in asked.budgets
        ],
        allocation=settings,
        granularity=granularity if default else asked.granularity,
        loss="next-token" if asked.loss == "auto" and cast(Any, model).can_generate() else asked.loss,
    )
    return own, settings


def experiments_for(name: str, kind: Any, config: Any) -> Experiments:
    """Experiments with the class whose function a format holds.

    Args:
        kind, config: the dense model's.

    Raises:
        ArgumentError: the config says something that the format cannot.
    """
    if FORMATS[name].as_llama:
        kind, config = LlamaForCausalLM, llama_of(config)
    made = Experiments(kind, config)
    # Each of its layers has to be one that transformers builds from a configuration and a number.
    stacks = sorted({layer.rsplit(".", 2)[0] for layer in made.layers})
    own = getattr(modeling_per_layer, f"PerLayer{kind.__name__}", None)
    if FORMATS[name].by_layer and (
        len(stacks) > 1 or own is None or Experiments(own, config).shapes != made.shapes
    ):
        raise ArgumentError(
            f"the format {name!r} has layers that are built from a configuration and a number, which those of"
            f" {kind.__name__} are not ({' and '.join(stacks)}); choose 'plain' or 'fasp-fx'"
        )
    return made


def _check_names(name: str, experiments: Experiments, weights: Mapping[str, Tensor]) -> None:
    """Refuse a weight that a format has no place for.

    Raises:
        ArgumentError: names it.
    """
    for own, tensor in weights.items():
        if own not in experiments.shapes:
            raise ArgumentError(
                f"the format {name!r} has no place for '{own}' {list(tensor.shape)}; choose another format"
            )


class Settings:
    """An allocation (see :data:`fasp_fx.allocation.Allocation`) that stays within what a format can say.

    Args:
        name: of the format.
        experiments: builds the model's class.
        allocate: how the channels share what is to go; it sees one group for all that shrink alike.

    Attributes:
        whole: for each group that no field can shrink alone, why; known once the allocation was made.
    """

    def __init__(self, name: str, experiments: Experiments, allocate: Allocation) -> None:
        self.name, self.experiments, self.allocate = name, experiments, allocate
        self.whole: dict[str, str] = {}

    def __call__(self, budget: Budget, round_to: int, costs: Costs | None = None) -> list[int]:
        """Channel sets lost per block of each group.

        Raises:
            NothingPrunableError: the format can say nothing.
            SparsityError: it cannot say enough, or its smallest step is too large.
        """
        narrowed, places = self._narrowed(budget)
        given = []
        if costs is not None:
            shrunk = [group for group, place in zip(budget.groups, places, strict=True) if place is not None]
            numbers = [place for place in places if place is not None]
            given.append(joined(costs, shrunk, numbers))
        allocate: Any = self.allocate
        lost = validate(allocate(narrowed, round_to, *given), narrowed)
        if not any(lost):
            raise SparsityError(
                f"the sparsity is less than half a step of what the format {self.name!r} can say; ask for"
                " more"
            )
        return narrowed.spread(lost, budget)

    def _narrowed(self, budget: Budget) -> tuple[Budget, list[int | None]]:
        """The budget for groups that each stand for all that shrink together, and which those are; errors as
        for a call.
        """
        own, form = self.experiments, FORMATS[self.name]
        fields = _fields(self.name, own, (place for group in budget.groups for place in units(group)))
        sized = {at for field in fields if field.path[0] not in form.at_once for at in field.moves}
        at_once = {group.name for group in budget.groups if units(group).keys().isdisjoint(sized)}
        # vLLM's first layer cannot be without attention.
        can = [
            group.name not in at_once
            or not (group.needed or (form.at_once and group.name.startswith(own.layers[0])))
            for group in budget.groups
        ]
        some = iter(arrange([*itertools.compress(budget.groups, can)], fields, _scopes(self.name, own)))
        found = [next(some) if able else None for able in can]
        what = "layer of" if form.by_layer else "field of"
        self.whole = {
            group.name: f"no {what} {own.name} shrinks with it and nothing else, as {self.name!r} says it"
            for group, place in zip(budget.groups, found, strict=True)
            if place is None
        }
        if all(place is None for place in found):
            raise NothingPrunableError("; ".join(dict.fromkeys(self.whole.values())))
        narrowed = budget.narrowed(found)
        narrowed.groups = [
            replace(group, at_once=group.name in at_once, multiple=math.lcm(group.multiple, form.multiple))
            for group in narrowed.groups
        ]
        return narrowed, found


class CostSettings(Settings, CostAllocation):
    """Settings whose channels are shared out by what they cost."""

    def check(self, budget: Budget, round_to: int) -> None:
        """Refuse what the format cannot say; errors as for a call."""
        cast(CostAllocation, self.allocate).check(self._narrowed(budget)[0], round_to)


def _scopes(name: str, experiments: Experiments) -> tuple[str, ...]:
    return experiments.layers if FORMATS[name].by_layer else ("",)


def _fields(name: str, experiments: Experiments, lost: Iterable[tuple[str, int]]) -> list[Field]:
    """The fields that a format has for each of its scopes."""
    form = FORMATS[name]
    found = find_fields(experiments, lost)
    if not form.by_layer:
        return found
    return [
        field
        for field in found
        if len(field.path) == 1
        and (form.fields is None or field.path[0] in form.fields)
        and all(place.startswith(experiments.layers) for place, _ in field.moves)
    ]


#: what fields say instead of what they say of the dense model, for each scope
Sizes = dict[str, dict[Path, int]]


def _sizes(name: str, experiments: Experiments, weights: Mapping[str, Tensor]) -> Sizes:
    """What a format says of weights some of which have shrunk.

    Raises:
        ArgumentError: it has no place for a weight, or cannot say a size.
    """
    _check_names(name, experiments, weights)
    left = experiments.lost({own: tuple(tensor.shape) for own, tensor in weights.items()})
    if left is None:
        raise ArgumentError(f"the format {name!r} cannot hold weights of other numbers of dimensions")
    fields = _fields(name, experiments, left) if left else []
    values = {field.path: field.value for field in fields}
    said: Sizes = {}
    at_once = FORMATS[name].at_once
    for scope in _scopes(name, experiments):
        inside = {at: by for at, by in left.items() if at[0].startswith(scope)}
        found, rest = lowered(inside, fields, scope)
        if any(path[0] in at_once and steps < values[path] for path, steps in found.items()):
            found, rest = lowered(inside, [own for own in fields if own.path[0] not in at_once], scope)
        said[scope] = {path: values[path] - steps for path, steps in found.items()}
        left = {at: by for at, by in left.items() if at in rest or at not in inside}
    for (weight, dim), by in left.items():
        raise ArgumentError(
            f"the format {name!r} cannot say that dimension {dim} of '{weight}' is {by} shorter; prune the"
            f" dense model with format={name!r}"
        )
    return said


def _note(experiments: Experiments, said: Sizes) -> str:
    """How a configuration says it, for a report."""
    found: dict[Path, list[int]] = {}
    for own in said.values():
        for path, value in own.items():
            found.setdefault(path, []).append(value)
    texts = (
        f"{written(path)} {experiments.values[path]} -> {min(values)}"
        + f" to {max(values)}" * (min(values) < max(values))
        + f" in {len(values)} of {len(said)} layers" * (len(said) > 1)
        for path, values in found.items()
    )
    return f"the config says it with {', '.join(texts)}"


def build(
    name: str, experiments: Experiments, weights: Mapping[str, Tensor], model: PreTrainedModel
) -> tuple[PreTrainedModel, str]:
    """A model in a format, of weights some of which have shrunk, and how its configuration says so.

    Args:
        experiments: with the class whose function the format holds, at the dense model's sizes.
        weights: by the names of that class.
        model: its attention, generation and training settings are taken over.

    Raises:
        ArgumentError: the format has no place for a weight, or cannot say a size.
        VerificationError: the class does not take them.
    """
    said = _sizes(name, experiments, weights)
    kind, config = experiments.kind, experiments.config({})
    if not FORMATS[name].by_layer:
        config = experiments.config(said[""])
    elif name == "decilm":
        kind, config = modeling_per_layer.DeciLMForCausalLM, _decilm(experiments, said)
    elif any(said.values()):
        kind = getattr(modeling_per_layer, f"PerLayer{kind.__name__}")
        least = _least_widths(experiments, said)
        dense = {path: experiments.values[path] for path in least}
        layers = {
            number: {str(path[0]): value for path, value in (dense | own).items()}
            for number, own in enumerate(said.values())
            if dense | own
        }
        config = experiments.config(
            {("per_layer_config",): layers, ("allow_global_per_layer_attribute_access",): True, **least}
        )
    if kind.__module__ == modeling_per_layer.__name__:  # whose file is saved along
        kind.register_for_auto_class(_auto_class(experiments.kind))
        modeling_per_layer.DeciLMConfig.register_for_auto_class()
    config.name_or_path = ""
    if hasattr(config, "quantization_config"):
        # Of the file that the model came from: what is pruned are the weights it was expanded to.
        del config.quantization_config
    attention = attention_of(model.config)
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    options |= {"config": config, "state_dict": dict(weights), "dtype": model.dtype}
    try:
        with quiet_transformers():
            made, info = kind.from_pretrained(None, output_loading_info=True, **options)
    except tolerable(Exception) as error:
        raise unlike(kind, f"its weights cannot be loaded: {first_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise unlike(kind, f"{problem.replace('_', ' ')}: {sorted(map(str, info[problem]))[0]}")
    theirs = dict(model.named_parameters())
    for own, parameter in made.named_parameters():
        if own in theirs:
            parameter.requires_grad_(theirs[own].requires_grad)
    if name != "decilm" and type(made).__module__ == modeling_per_layer.__name__:
        # vLLM looks for the model without its head.
        inner = f"PerLayer{type(made.base_model).__name__}"
        made.config.auto_map = {"AutoModel": f"modeling_per_layer.{inner}"}
    made.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    if not FORMATS[name].by_layer:
        # Names that were not converted on loading would not be on saving: others read those of checkpoints.
        forget_conversions(made)
    return made.eval().to(next(iter(weights.values())).device), _note(experiments, said)


def _least_widths(experiments: Experiments, said: Sizes) -> dict[Path, int]:
    """The widths of experts that a configuration says for all layers, beside those of each.

    vLLM makes all experts as wide as that, and leaves what a narrower one lacks to chance; it refuses wider
    ones.
    """
    dense = experiments.values
    return {
        path: min(own.get(path, dense[path]) for own in said.values())
        for path in {path for own in said.values() for path in own}
        if dense[path] is not None
        and any(
            dim > 0 and len(experiments.shapes[at]) > 2
            for at, dim in experiments.losses({path: dense[path] - 1}) or ()
        )
    }


def _decilm(experiments: Experiments, said: Sizes) -> PreTrainedConfig:
    base = experiments.base
    present = {"no_op": False, "replace_with_linear": False}
    width = base["intermediate_size"]
    heads = {"n_heads_in_group": base["num_attention_heads"] // base["num_key_value_heads"]}
    blocks = [
        {
            "attention": present | (heads if own.get(("num_attention_heads",), 1) else {"no_op": True}),
            "ffn": present | (_say_width(wide, base["hidden_size"]) if wide else {"no_op": True}),
        }
        for own in said.values()
        for wide in [own.get(("intermediate_size",), width)]
    ]
    kept = {key: value for key, value in base.items() if key not in BY_LAYER}
    return modeling_per_layer.DeciLMConfig(block_configs=blocks, **kept)


def _say_width(width: int, hidden: int) -> dict[str, float]:
    """How a block's configuration says the width of its feed-forward layer."""
    if width % modeling_per_layer.STEP:
        return {"intermediate_size": width}  # vLLM reads it, and no other
    return {"ffn_mult": 1.5 * width / hidden}


def _auto_class(kind: Any) -> str:
    """Which of transformers' Auto classes loads a class."""

    def loads(name: str) -> bool:
        found = classes_by_config(getattr(modeling_auto, name)).get(kind.config_class, None)
        return kind in (found if isinstance(found, tuple) else (found,))

    names = (name for name in modeling_auto.__all__ if name.startswith("AutoModel"))
    return next(filter(loads, names), "AutoModel")


def _batches(
    model: PreTrainedModel, calibration: Iterable[Any] | None
) -> tuple[Iterable[Any] | None, dict[str, Any]]:
    """The calibration data, and keyword arguments like its first batch to capture with, without a cache."""
    if calibration is None:
        return None, example_of(model)
    batches = iter(calibration)
    first = list(itertools.islice(batches, 1))
    args, kwargs = next(as_calls(first))
    named = {"input_ids": args[0]} if args else kwargs
    return itertools.chain(first, batches), {**named, "use_cache": False}


def example_of(model: PreTrainedModel) -> dict[str, Any]:
    """Keyword arguments to call a model with, without a cache."""
    tokens = torch.zeros(_EXAMPLE, dtype=torch.long, device=device_of(model))
    decoded = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    return {"input_ids": tokens, **decoded, "use_cache": False}


def smaller_weights(model: nn.Module, result: Result) -> dict[str, Tensor]:
    """The smaller parameters of ``model`` and its persistent buffers, under all their names; none shares
    storage with ``model``.

    A fused weight that the program holds in parts is put together again. A parameter that the program does
    not use is as it was.
    """
    pruned = dict(result.module.named_parameters(remove_duplicate=False))
    made = pruned | fused_weights(result.plan, pruned)
    return {
        name: made[name].detach() if name in made else tensor.detach().clone()
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
