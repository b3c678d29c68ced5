"""Prune to what a format of model files can hold, and build the model that is then written."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasp_fx.allocation import Bytes, CacheBytes, Search
from fasp_fx.analysis import DEPTH, PRUNABLE, Group, PruningPlan
from fasp_fx.base import attention_of, device_of, quiet_transformers, tolerable
from fasp_fx.calibration import HeldOut, Ranks, as_calls, check_calibration
from fasp_fx.capturing import capture_whole
from fasp_fx.errors import ArgumentError, NothingPrunableError, first_line
from fasp_fx.passes import fused_weights
from fasp_fx.pruning import (
    Job,
    Method,
    PruningConfig,
    Report,
    Result,
    Step,
    Whole,
    allocation_of,
    prune_subject,
)

from ._fields import Experiments, arrange, check_equal, lowered, units, unlike, written
from ._folder import first_fault
from ._registry import PER_LAYER, Format, PerLayer, Sizes, format_of

#: tokens of an example where there is no calibration data to take one from
_EXAMPLE = (2, 8)


def prune_to(
    name: str | None,
    model: Any,
    tokenizer: Any,
    calibration: HeldOut | None,
    asked: PruningConfig,
    device: torch.device | str | None,
    **passed: Any,
) -> tuple[PreTrainedModel, PruningPlan, Report]:
    """Prune a transformers model by what a format can say: the result is a model of transformers in that
    format, with the plan and the report.

    Which fields of the config shrink which groups is found by building the class at other sizes on the meta
    device. Groups that no field of the format shrinks are left whole; the report says why. The result is
    compared with the pruned program before it is handed out.

    Args:
        name: of the format; ``None``: that with layers of their own sizes, if it can say whatever can be
            pruned.
        model: a transformers model in evaluation mode; it is left as it was.
        tokenizer: that a GGUF file is to hold.
        calibration, device: as for :func:`fasp_fx.prune`.
        asked: the options, with one sparsity or budgets. An allocation sees one group for all that have one
            size.
        passed: what :func:`fasp_fx.prune` takes besides.

    Raises:
        ArgumentError: the model is not one of transformers', its config does not describe it, or the format
            cannot hold it, its tokenizer, or what the options ask for.
        NothingPrunableError: the format can say nothing of it, or with ``None`` not all; the message says
            what stands in the way.
        SparsityError: it cannot say enough; the message says how much it can.
        VerificationError: the model that was built does not compute what the pruned program computes.
        CalibrationError, CaptureError: as for :func:`fasp_fx.prune`.
    """
    config, constraint = config_for(name or PER_LAYER.name, model, asked)
    constraint.complete = name is None
    if Method.of(asked).needs_data:
        check_calibration(calibration)
    example = _example(model, calibration)
    # A program that returns a cache says how large it is.
    example["use_cache"] = any(isinstance(cap, CacheBytes) for cap in asked.budgets)
    form = constraint.form
    # What the file cannot say is refused before the work.
    dense, _ = build(form.name, constraint.experiments, model.state_dict(keep_vars=True), model)
    rounded = check_equal(dense, model, example)
    form.check_file(dense, tokenizer)
    captured = capture_whole(dense, (), example, device=device)
    job = Job(
        ranks=Ranks.of(passed.pop("group")),
        loss="next-token" if model.can_generate() else "outputs",
        constraint=constraint,
        **passed,
    )
    result = prune_subject(Whole(captured.checked(), device), config, calibration, job)
    smaller, note = build(form.name, constraint.experiments, smaller_weights(dense, result), model)
    check_equal(smaller, result.module, example)
    smaller.name_or_path = model.name_or_path
    lines = tuple(
        replace(line, reason=f"left whole: {constraint.whole[line.name]}")
        if line.status == PRUNABLE and line.name in constraint.whole
        else line
        for line in result.report.lines
    )
    bytes_of = Bytes(1.0, form.stored).held
    report = replace(
        result.report,
        bytes=(round(bytes_of(model.parameters())), round(bytes_of(smaller.parameters()))),
        lines=lines,
        notes=(note, *rounded, *result.report.notes),
        config=asked,
    )
    return cast(Any, smaller).to(device_of(model)), result.plan, report


def config_for(name: str, model: Any, asked: PruningConfig) -> tuple[PruningConfig, FormatConstraint]:
    """The configuration with which a model is pruned to a format, and what the format can say.

    Raises:
        ArgumentError: as for :func:`prune_to`.
    """
    form = format_of(name)
    if not isinstance(model, PreTrainedModel):
        raise ArgumentError(
            f"format={name!r} is for models of transformers, not for a {type(model).__name__}"
        )
    for option, is_asked in (
        ("include='depth'", DEPTH in asked.include and not form.by_layer),
        ("sparsity by pattern", isinstance(asked.sparsity, Mapping)),
        ("allocation by trial", isinstance(allocation_of(asked), Search)),
    ):
        if is_asked:
            raise ArgumentError(
                f"{option} cannot be had in the format {name!r}, which says sizes of several weights at"
                " once; leave it out, or prune to 'fasp-fx'"
            )
    experiments = form.experiments(type(model), model.config, model.state_dict())
    default = asked.granularity == PruningConfig.granularity
    # Attention goes with all of its heads.
    granularity = PerLayer.granularity if DEPTH in asked.include else form.granularity
    narrower = replace(
        asked,
        budget=[
            replace(cap, stored=cap.stored or form.stored) if isinstance(cap, Bytes) else cap
            for cap in asked.budgets
        ],
        granularity=granularity if default else asked.granularity,
    )
    return narrower, FormatConstraint(form, experiments)


class FormatConstraint:
    """What a format can say of the sizes of a model (see :class:`fasp_fx.pruning.Constraint`).

    Args:
        form: the format.
        experiments: builds the model's class.

    Attributes:
        complete: whether it has to shrink every group.
        whole: for each group that no field can shrink alone, why; known once it was called.
    """

    complete = False

    def __init__(self, form: Format, experiments: Experiments) -> None:
        self.form, self.experiments, self.source = form, experiments, f"the format {form.name!r}"
        self.whole: dict[str, str] = {}

    def __call__(self, groups: Sequence[Group]) -> tuple[list[int | None], list[Step]]:
        """Groups that shrink together are tied.

        Raises:
            NothingPrunableError: the format can say nothing, or not all where it has to.
        """
        experiments, form = self.experiments, self.form
        fields = form.fields_of(experiments, (place for group in groups for place in units(group)))
        sized = {at for field in fields if field.path[0] not in form.at_once for at in field.moves}
        steps = [Step(form.multiple, units(group).keys().isdisjoint(sized)) for group in groups]
        # vLLM's first layer cannot be without attention.
        needed = [
            group.needed or (form.at_once and group.name.startswith(experiments.layers[0]))
            for group in groups
        ]
        can = [not (step.at_once and need) for step, need in zip(steps, needed, strict=True)]
        some = iter(arrange([*itertools.compress(groups, can)], fields, form.scopes(experiments)))
        ties = [next(some) if able else None for able in can]
        what = "layer of" if form.by_layer else "field of"
        self.whole = {
            group.name: f"no {what} {experiments.name} shrinks with it and nothing else, as {form.name!r}"
            " says it"
            for group, tie in zip(groups, ties, strict=True)
            if tie is None
        }
        if self.whole and (self.complete or len(self.whole) == len(ties)):
            named = f"'{next(iter(self.whole))}' would stay whole: " if self.complete else ""
            raise NothingPrunableError(named + "; ".join(dict.fromkeys(self.whole.values())))
        return ties, steps


def _example(model: PreTrainedModel, calibration: HeldOut | None) -> dict[str, Any]:
    """Keyword arguments like the first calibration batch to capture with, without a cache."""
    if calibration is None:
        return example_of(model)
    args, kwargs = next(as_calls(calibration))
    return ({"input_ids": args[0]} if args else kwargs) | {"use_cache": False}


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
    pruned: dict[str, Tensor] = dict(result.module.named_parameters(remove_duplicate=False))
    pruned |= fused_weights(result.plan, pruned)
    return {
        name: pruned[name].detach() if name in pruned else tensor.detach().clone()
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


# --- Build a model of transformers in a format, of weights some of which have shrunk.


def build(
    name: str, experiments: Experiments, weights: Mapping[str, Tensor], model: PreTrainedModel
) -> tuple[PreTrainedModel, str]:
    """A model in a format, and how its configuration says its sizes.

    Args:
        name: of the format.
        experiments: with the class whose function the format holds, at the dense model's sizes.
        weights: by the names of that class.
        model: its attention, generation and training settings are taken over.

    Raises:
        ArgumentError: the format has no place for a weight, or cannot say a size.
        VerificationError: the class does not take them.
    """
    form = format_of(name)
    sizes = sizes_of(form, experiments, weights)
    kind, config = form.describe(experiments, sizes)
    config.name_or_path = ""
    # Of the file that the model came from: what is pruned are the weights it was expanded to.
    vars(config).pop("quantization_config", None)
    options = {"config": config, "state_dict": dict(weights), "dtype": model.dtype}
    if (attention := attention_of(model.config)) is not None:
        options["attn_implementation"] = attention
    try:
        with quiet_transformers():
            smaller, info = kind.from_pretrained(None, output_loading_info=True, **options)
    except tolerable(Exception) as error:
        raise unlike(kind, f"its weights cannot be loaded: {first_line(error)}") from error
    if fault := first_fault(info):
        raise unlike(kind, fault)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for parameter_name, parameter in smaller.named_parameters():
        parameter.requires_grad_(trained.get(parameter_name, parameter.requires_grad))
    form.settle(smaller)
    smaller.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return smaller.eval().to(next(iter(weights.values())).device), _note(experiments, sizes)


def sizes_of(form: Format, experiments: Experiments, weights: Mapping[str, Tensor]) -> Sizes:
    """What a format says of weights some of which have shrunk.

    Raises:
        ArgumentError: it has no place for a weight, or cannot say a size.
    """
    form.check_names(experiments, weights)
    rest = experiments.lost({weight: tuple(tensor.shape) for weight, tensor in weights.items()})
    if rest is None:
        raise ArgumentError(f"the format {form.name!r} cannot hold weights of other numbers of dimensions")
    fields = form.fields_of(experiments, rest) if rest else []
    values = {field.path: field.value for field in fields}
    sizes: Sizes = {}
    for scope in form.scopes(experiments):
        inside = {place: by for place, by in rest.items() if place[0].startswith(scope)}
        steps, unsaid = lowered(inside, fields, scope)
        if any(path[0] in form.at_once and by < values[path] for path, by in steps.items()):
            steps, unsaid = lowered(
                inside, [field for field in fields if field.path[0] not in form.at_once], scope
            )
        sizes[scope] = {path: values[path] - by for path, by in steps.items()}
        rest = {place: by for place, by in rest.items() if place in unsaid or place not in inside}
    for (weight, dim), by in rest.items():
        raise ArgumentError(
            f"the format {form.name!r} cannot say that dimension {dim} of '{weight}' is {by} shorter; prune"
            f" the dense model with format={form.name!r}"
        )
    return sizes


def _note(experiments: Experiments, sizes: Sizes) -> str:
    """How a configuration says it, for a report."""
    by_path = {
        path: [lower[path] for lower in sizes.values() if path in lower]
        for lower in sizes.values()
        for path in lower
    }
    texts = (
        f"{written(path)} {experiments.values[path]} -> {min(values)}"
        + f" to {max(values)}" * (min(values) < max(values))
        + f" in {len(values)} of {len(sizes)} layers" * (len(sizes) > 1)
        for path, values in by_path.items()
    )
    return f"the config says it with {', '.join(texts)}"
