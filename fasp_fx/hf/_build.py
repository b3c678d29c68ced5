"""Build a model of transformers in a format, of weights some of which have shrunk."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fasp_fx.base import attention_of, quiet_transformers, tolerable
from fasp_fx.errors import ArgumentError, first_line

from ._claims import unlike
from ._fields import Experiments, Path, lowered, written
from ._offloaded import first_fault
from ._registry import Format, Sizes, format_of


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
    if hasattr(config, "quantization_config"):
        # Of the file that the model came from: what is pruned are the weights it was expanded to.
        del config.quantization_config
    attention = attention_of(model.config)
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    options |= {"config": config, "state_dict": dict(weights), "dtype": model.dtype}
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
            others = [field for field in fields if field.path[0] not in form.at_once]
            steps, unsaid = lowered(inside, others, scope)
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
    by_path: dict[Path, list[int]] = {}
    for lower in sizes.values():
        for path, value in lower.items():
            by_path.setdefault(path, []).append(value)
    texts = (
        f"{written(path)} {experiments.values[path]} -> {min(values)}"
        + f" to {max(values)}" * (min(values) < max(values))
        + f" in {len(values)} of {len(sizes)} layers" * (len(sizes) > 1)
        for path, values in by_path.items()
    )
    return f"the config says it with {', '.join(texts)}"
