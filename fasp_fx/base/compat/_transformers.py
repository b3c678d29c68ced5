"""The exporter of transformers, and what it knows of caches."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

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

from .._undisturbed import for_a_while

#: the name of the argument and of the output that holds keys and values of the tokens seen; until 5.23 it was
#: a longer one
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"


def export_program(model: PreTrainedModel, inputs: dict[str, Any], shapes: Any) -> ExportedProgram:
    """The program of a model by the exporter of transformers; until 5.22 it was called otherwise and returned
    nothing else. Its logger, which is none of those of transformers, is silent.
    """
    exporter: Any = DynamoExporter()
    config = DynamoConfig(dynamic=shapes is not None, dynamic_shapes=shapes)
    logger = exporter_dynamo.logger
    found: ExportedProgram
    with for_a_while(lambda: logger.level, logger.setLevel):
        logger.setLevel(logging.ERROR)
        if hasattr(exporter, "export_program"):
            found, _ = exporter.export_program(model, inputs, config)
        else:
            found = exporter.export(model, inputs, config)
    return found


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from remarking on configs that are only tried, and from drawing bars."""
    with (
        for_a_while(logging.get_verbosity, logging.set_verbosity),
        for_a_while(logging.is_progress_bar_enabled, _draw_bars),
        warnings.catch_warnings(action="ignore"),
    ):
        logging.set_verbosity(logging.CRITICAL)
        _draw_bars(False)
        yield


def _draw_bars(wanted: bool) -> None:
    (logging.enable_progress_bar if wanted else logging.disable_progress_bar)()


@contextlib.contextmanager
def reading_gguf() -> Iterator[None]:
    """Have transformers read a GGUF file once, which takes seconds, and list the names of its tensors once,
    not for each module; and keep it from drawing a bar of its own, which no setting turns off.
    """
    import gguf

    with (
        mock.patch(
            "transformers.modeling_gguf_pytorch_utils.tqdm", lambda items, **options: items, create=True
        ),
        mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        yield


def kept_in_float32(model: nn.Module) -> set[str]:
    """Parts of the names of weights that transformers may keep in float32, whatever the model's type."""
    lists = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return {
        part for module in model.modules() for name in lists for part in getattr(module, name, None) or ()
    }


__all__ = [
    "CACHE",
    "export_program",
    "get_auto_dynamic_shapes",
    "is_cache_class",
    "kept_in_float32",
    "prepare_for_export",
    "quiet_transformers",
    "reading_gguf",
    "register_cache_pytrees_for_model",
    "register_pytree_node",
]
