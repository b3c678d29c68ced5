"""The exporter of transformers, and what it knows of caches."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from transformers import PreTrainedModel
from transformers.exporters import exporter_dynamo
from transformers.exporters.exporter_dynamo import (
    DynamoConfig,
    DynamoExporter,
    get_auto_dynamic_shapes,
    is_cache_class,
    register_cache_pytrees_for_model,
    register_pytree_node,
)
from transformers.exporters.utils import prepare_for_export
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from .._undisturbed import for_a_while, logging_from

#: the name of the argument and of the output that holds keys and values of the tokens seen; until 5.23 it was
#: a longer one
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"


def export_program(model: PreTrainedModel, inputs: dict[str, Any], shapes: Any) -> ExportedProgram:
    """The program of a model by the exporter of transformers; until 5.22 it was called otherwise and returned
    nothing else. Its logger, which is none of those of transformers, is silent.
    """
    exporter: Any = DynamoExporter()
    config = DynamoConfig(dynamic=shapes is not None, dynamic_shapes=shapes)
    with logging_from(logging.ERROR, exporter_dynamo.logger.name):
        if hasattr(exporter, "export_program"):
            return exporter.export_program(model, inputs, config)[0]
        return exporter.export(model, inputs, config)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from remarking on configs that are only tried, and from drawing bars."""
    with (
        for_a_while(logging.get_verbosity, logging.set_verbosity),
        for_a_while(logging.is_progress_bar_enabled, lambda on: on and logging.enable_progress_bar()),
        warnings.catch_warnings(action="ignore"),
    ):
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        yield


def kept_in_float32(model: nn.Module) -> set[str]:
    """Parts of the names of weights that transformers may keep in float32, whatever the model's type."""
    return {
        part
        for module in model.modules()
        for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for part in getattr(module, name, None) or ()
    }


def attention_of(config: Any) -> str | None:
    """The implementation of attention that a configuration asks for, where it asks for one."""
    return getattr(config, "_attn_implementation", None)


def classes_by_config(auto: type) -> Mapping[Any, Any]:
    """The classes of models that an Auto class loads, by those of their configurations; none where it keeps
    them elsewhere.
    """
    return getattr(auto, "_model_mapping", {})


def forget_conversions(model: Any) -> None:
    """Let a model be saved under the names that its parameters have."""
    model._weight_conversions = None


def mark_as_given(cache: Any) -> None:
    """Say of a cache that the caller brought it, so that ``generate`` gives it back."""
    cache._is_user_defined = True


__all__ = [
    "CACHE",
    "attention_of",
    "classes_by_config",
    "export_program",
    "forget_conversions",
    "get_auto_dynamic_shapes",
    "is_cache_class",
    "kept_in_float32",
    "mark_as_given",
    "prepare_for_export",
    "quiet_transformers",
    "register_cache_pytrees_for_model",
    "register_pytree_node",
]
