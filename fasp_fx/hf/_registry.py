"""The formats of model files, each an object: what it can say of a model, how it says so, and how its folders
are written and read. A new one is a class or an entry here, and its name in ``FormatName``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import transformers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from fasp_fx.base import classes_by_config, forget_conversions
from fasp_fx.errors import ArgumentError, StoreError
from fasp_fx.pruning import FormatName, Granularity
from fasp_fx.storage import parsing, read_json, read_manifest, write_json

from . import _model, modeling_per_layer
from ._config import original_of
from ._fields import Experiments, Field, Place, find_fields, llama_of, refuse_unsaid
from ._folder import KIND, PLAIN, fill, first_fault
from ._gguf import bytes_each, describe_gguf, write_gguf

#: what fields say instead of what they say of the dense model, for each scope
Sizes = dict[str, dict[Place, int]]
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


@dataclass(frozen=True)
class Format:
    """A model of its original class, whose configuration says one size for all layers.

    Attributes:
        name: how callers ask for it.
        multiple: widths are multiples of it.
        folder: the kind of its folders.
        granularity: what is pruned unless the caller says.
        by_layer: whether each layer has sizes of its own, 0 for a block that is absent.
        fields: which fields of a config say them; ``None``: any that do.
        at_once: those of them that stay as they are, or are 0.
        as_llama: whether it is for models that compute what transformers' Llama does, whatever their class.
    """

    name: FormatName
    multiple: int = 1
    folder: ClassVar[str] = PLAIN
    granularity: ClassVar[tuple[Granularity, ...]] = ("channel",)
    by_layer: ClassVar[bool] = False
    fields: ClassVar[frozenset[str] | None] = None
    at_once: ClassVar[frozenset[str]] = frozenset()
    as_llama: ClassVar[bool] = False

    @property
    def stored(self) -> Callable[[Tensor], float] | None:
        """How many bytes a file besides takes for each number of a weight; ``None``: there is none."""
        return None

    def experiments(self, kind: Any, config: Any, weights: Mapping[str, Tensor] = {}) -> Experiments:
        """Experiments with the class whose function the format holds.

        Args:
            kind, config: the dense model's.
            weights: those that it has to have a place for.

        Raises:
            ArgumentError: the config says something that the format cannot, or it has no place for a weight.
        """
        as_built = (LlamaForCausalLM, llama_of(config)) if self.as_llama else (kind, config)
        experiments = Experiments(*as_built)
        self._check_layers(experiments)
        self.check_names(experiments, weights)
        if self.as_llama:
            refuse_unsaid(self.name, kind, config)
        return experiments

    def check_names(self, experiments: Experiments, weights: Mapping[str, Tensor]) -> None:
        """Refuse a weight that the format has no place for.

        Raises:
            ArgumentError: names it.
        """
        for weight in (name for name in weights if name not in experiments.shapes):
            raise ArgumentError(
                f"the format {self.name!r} has no place for '{weight}' {list(weights[weight].shape)}; choose"
                " another format"
            )

    def _check_layers(self, experiments: Experiments) -> None:
        """Refuse a class whose layers the format cannot build."""

    def scopes(self, experiments: Experiments) -> tuple[str, ...]:
        """What the names of weights begin with, for which fields have values of their own."""
        return ("",)

    def fields_of(self, experiments: Experiments, lost: Iterable[tuple[str, int]]) -> list[Field]:
        """The fields that the format has for each of its scopes, of those that say these dimensions."""
        return find_fields(experiments, lost)

    def describe(self, experiments: Experiments, sizes: Sizes) -> tuple[Any, PreTrainedConfig]:
        """The class and the configuration of a model of these sizes."""
        return experiments.kind, experiments.config(sizes[""])

    def settle(self, model: Any) -> None:
        """Do to a model that was built what its files need."""
        # Names that were not converted on loading would not be on saving: others read those of checkpoints.
        forget_conversions(model)

    def dense(self, model: Any) -> tuple[Any, Any]:
        """The class and the configuration of the dense model, of which ``model`` is what is left.

        Raises:
            ArgumentError: its class is not one of transformers'.
        """
        return type(model), model.config

    def holds(self, kind: type) -> bool:
        """Whether a class of models is that of the format's folders."""
        return kind.__module__ != modeling_per_layer.__name__

    def check_file(self, model: Any, tokenizer: Any) -> None:
        """Refuse what a file that is written besides cannot hold.

        Raises:
            ArgumentError: says what.
        """

    def write(self, folder: Path, model: Any, tokenizer: Any) -> None:
        """Write a model, in a file besides with its tokenizer.

        Raises:
            StoreError: the model holds something that cannot be stored.
            ArgumentError: a file cannot hold the tokenizer, or a weight in its type.
        """
        model.save_pretrained(folder)
        _say_positions(folder / "config.json")

    def load(self, kind: Any, folder: Path, device: Any) -> Any:
        """The model of a folder that was held against its manifest.

        Raises:
            StoreError: a file is damaged.
        """
        with parsing("config.json"):
            model, info = kind.from_pretrained(
                folder, dtype="auto", device_map=device, output_loading_info=True
            )
        if fault := first_fault(info):
            raise StoreError(
                f"model.safetensors does not hold what config.json says ({fault:.200}): weights would be made"
                " up or left out; save the model again"
            )
        return model


class Program(Format):
    """The pruned program, for any model."""

    folder = KIND

    def dense(self, model: Any) -> tuple[Any, Any]:
        config = original_of(model.config)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        if kind is None:
            raise ArgumentError("the model's class is not one of transformers'; it stays as it is")
        return kind, config

    def holds(self, kind: type) -> bool:
        return issubclass(kind, _model.PrunedModel)

    def write(self, folder: Path, model: Any, tokenizer: Any) -> None:
        fill(folder, model, None)

    def load(self, kind: Any, folder: Path, device: Any) -> Any:
        return kind.from_pretrained(folder, device_map=device)


class PerLayer(Format):
    """A model of its original class, with layers of their own sizes."""

    granularity: ClassVar[tuple[Granularity, ...]] = ("channel", "head")
    by_layer = True

    def _check_layers(self, experiments: Experiments) -> None:
        # Each has to be one that transformers builds from a configuration and a number.
        kind, stacks = experiments.kind, sorted({layer.rsplit(".", 2)[0] for layer in experiments.layers})
        layered = _layered(kind)
        same = layered is not None and Experiments(layered, experiments.dense).shapes == experiments.shapes
        if len(stacks) > 1 or not same:
            raise ArgumentError(
                f"the format {self.name!r} has layers that are built from a configuration and a number, which"
                f" those of {kind.__name__} are not ({' and '.join(stacks)}); choose 'plain' or 'fasp-fx'"
            )

    def scopes(self, experiments: Experiments) -> tuple[str, ...]:
        return experiments.layers

    def fields_of(self, experiments: Experiments, lost: Iterable[tuple[str, int]]) -> list[Field]:
        return [
            field
            for field in super().fields_of(experiments, lost)
            if len(field.path) == 1
            and (self.fields is None or field.path[0] in self.fields)
            and all(place.startswith(experiments.layers) for place, _ in field.moves)
        ]

    def describe(self, experiments: Experiments, sizes: Sizes) -> tuple[Any, PreTrainedConfig]:
        if not any(sizes.values()):
            return experiments.kind, experiments.config({})
        least = _least_widths(experiments, sizes)
        dense = {path: experiments.values[path] for path in least}
        by_layer: dict[Place, Any] = {
            ("per_layer_config",): {
                number: {str(path[0]): value for path, value in (dense | lowered).items()}
                for number, lowered in enumerate(sizes.values())
                if dense | lowered
            },
            ("allow_global_per_layer_attribute_access",): True,
        }
        return _saved_along(_layered(experiments.kind)), experiments.config({**by_layer, **least})

    def load(self, kind: Any, folder: Path, device: Any) -> Any:
        return super().load(_saved_along(kind), folder, device)

    def settle(self, model: Any) -> None:
        if PerLayer.holds(self, type(model)):
            # vLLM looks for the model without its head.
            model.config.auto_map = {
                "AutoModel": f"modeling_per_layer.PerLayer{type(model.base_model).__name__}"
            }

    def dense(self, model: Any) -> tuple[Any, Any]:
        kind: Any = type(model)
        if kind.__module__ != modeling_per_layer.__name__:
            return super().dense(model)
        kind, fields = kind.__bases__[1], json.loads(model.config.to_json_string(use_diff=False))
        return kind, kind.config_class.from_dict({key: fields[key] for key in fields if key not in BY_LAYER})

    def holds(self, kind: type) -> bool:
        return not super().holds(kind) and kind is not modeling_per_layer.DeciLMForCausalLM


class DeciLM(PerLayer):
    """A Llama with feed-forward layers of their own widths, as vLLM and others read it."""

    granularity = ("channel",)
    fields = _SIZES
    at_once = _HEADS
    as_llama = True

    def describe(self, experiments: Experiments, sizes: Sizes) -> tuple[Any, PreTrainedConfig]:
        base = experiments.base
        present = {"no_op": False, "replace_with_linear": False}
        heads = {"n_heads_in_group": base["num_attention_heads"] // base["num_key_value_heads"]}
        blocks = []
        for lowered in sizes.values():
            width = lowered.get(("intermediate_size",), base["intermediate_size"])
            attention = heads if lowered.get(("num_attention_heads",), 1) else {"no_op": True}
            ffn = _say_width(width, base["hidden_size"])
            blocks.append({"attention": present | attention, "ffn": present | ffn})
        kept = {key: value for key, value in base.items() if key not in BY_LAYER}
        config = modeling_per_layer.DeciLMConfig(block_configs=blocks, **kept)
        return _saved_along(modeling_per_layer.DeciLMForCausalLM), config

    def holds(self, kind: type) -> bool:
        return kind is modeling_per_layer.DeciLMForCausalLM


@dataclass(frozen=True)
class Gguf(PerLayer):
    """A Llama with layers of their own sizes, with a GGUF file besides.

    Attributes:
        tensors: how it holds matrices, by the name of the ``gguf`` package, or ``""`` as they are.
    """

    tensors: str = ""
    fields = _SIZES
    as_llama = True

    @property
    def stored(self) -> Callable[[Tensor], float]:
        return partial(bytes_each, tensors=self.tensors)

    def check_file(self, model: Any, tokenizer: Any) -> None:
        describe_gguf(Path(), model, self.tensors, tokenizer)

    def write(self, folder: Path, model: Any, tokenizer: Any) -> None:
        super().write(folder, model, tokenizer)
        write_gguf(folder / "model.gguf", model, self.tensors, tokenizer)


#: the format of a pruned program
OWN = Program("fasp-fx")
#: that of a model's own class with layers of their own sizes
PER_LAYER = PerLayer("per-layer")
#: of two that hold a class, the first is what a folder is read as
FORMATS: Mapping[str, Format] = {
    form.name: form
    for form in (
        OWN,
        Format("plain"),
        PER_LAYER,
        DeciLM("decilm"),
        Gguf("gguf"),
        Gguf("gguf-f16", tensors="F16"),
        Gguf("gguf-bf16", tensors="BF16"),
        # blocks of 32 numbers of a row
        Gguf("gguf-q8_0", 32, "Q8_0"),
        Gguf("gguf-q4_0", 32, "Q4_0"),
    )
}


def format_of(name: str) -> Format:
    """A format by its name.

    Raises:
        ArgumentError: there is none; lists those that there are.
    """
    if name not in FORMATS:
        raise ArgumentError(f"format={name!r:.80} is not known; use {', '.join(map(repr, FORMATS))}")
    return FORMATS[name]


def format_in(folder: Path) -> tuple[Format, type]:
    """The format of a folder, and the class of the model in it.

    Raises:
        StoreError: no format has such folders.
    """
    kind, (name, model_class) = read_manifest(folder).kind, class_in(folder)
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        for form in FORMATS.values():
            if form.folder == kind and form.holds(model_class):
                return form, model_class
    raise StoreError(
        f"config.json names the class {name!r:.80}, and folders of the kind {kind!r:.80} hold none of that"
        " name; save the model again"
    )


def class_in(folder: Path) -> tuple[str, Any]:
    """The class that the configuration of a folder names, of transformers or of this library; the name alone,
    and ``None``, if neither has one.

    Raises:
        StoreError: the configuration is missing or damaged.
    """
    with parsing("config.json"):
        name = str((read_json(folder / "config.json").get("architectures") or ["none"])[0])
    homes = (transformers, modeling_per_layer, _model)
    return name, next((getattr(home, name) for home in homes if hasattr(home, name)), None)


def _layered(kind: Any) -> Any:
    """The class whose layers have sizes of their own, of one of transformers'."""
    return getattr(modeling_per_layer, f"PerLayer{kind.__name__}", None)


def _saved_along(kind: Any) -> Any:
    """A class of :mod:`modeling_per_layer`, whose file is saved along with its models."""
    kind.register_for_auto_class(_auto_class(kind.__bases__[1]))
    modeling_per_layer.DeciLMConfig.register_for_auto_class()
    return kind


def _auto_class(kind: Any) -> str:
    """Which of transformers' Auto classes loads a class."""

    def loads(name: str) -> bool:
        kinds = classes_by_config(getattr(modeling_auto, name)).get(kind.config_class, None)
        return kind in (kinds if isinstance(kinds, tuple) else (kinds,))

    return next(
        filter(loads, (name for name in modeling_auto.__all__ if name.startswith("AutoModel"))), "AutoModel"
    )


def _least_widths(experiments: Experiments, sizes: Sizes) -> dict[Place, int]:
    """The widths of experts that a configuration says for all layers, beside those of each.

    vLLM makes all experts as wide as that, and leaves what a narrower one lacks to chance; it refuses wider
    ones.
    """
    dense = experiments.values
    return {
        path: min(lowered.get(path, dense[path]) for lowered in sizes.values())
        for path in {path for lowered in sizes.values() for path in lowered}
        if dense[path] is not None
        and any(
            dim > 0 and len(experiments.shapes[at]) > 2
            for at, dim in experiments.losses({path: dense[path] - 1}) or ()
        )
    }


def _say_width(width: int, hidden: int) -> dict[str, Any]:
    """How a block's configuration says the width of its feed-forward layer."""
    if not width:
        return {"no_op": True}
    if width % modeling_per_layer.STEP:
        return {"intermediate_size": width}  # vLLM reads it, and no other
    return {"ffn_mult": 1.5 * width / hidden}


def _say_positions(file: Path) -> None:
    """Say in a configuration what its positions are as it was said before transformers 5, too: readers that
    look for that take numbers of their own where it is missing.
    """
    config = read_json(file)
    scaling = dict(config.get("rope_parameters") or {})
    if "rope_theta" in scaling:  # else there are none, or each kind of layer has its own
        alone = {key: scaling.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in scaling}
        scaled = {} if scaling.get("rope_type") == "default" else {"rope_scaling": scaling}
        write_json(file, config | alone | scaled)
