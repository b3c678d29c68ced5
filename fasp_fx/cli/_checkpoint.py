"""What can be known of a model folder before anything in it is loaded: whether its files are files, and its
sizes are those of a model.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError
from ..hf._offloaded import refuse_left_out
from ..storage._config_json import LAYERS, layer_counts

#: the largest vocabularies have a million
WIDTH = 2**24
#: a configuration takes some thousand bytes; an index of shards some hundred for each weight
_JSON_BYTES = 2**26
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def check_folder(folder: Path) -> None:
    """Refuse a model folder whose files would keep a reader waiting, and a configuration that asks for the
    impossible.

    Raises:
        ArgumentError: names the file.
    """
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise ArgumentError(
            f"the folder '{folder}' cannot be read: {error.strerror}; change its permissions, or give"
            " another one"
        ) from error
    for file in files:
        try:
            mode = file.stat().st_mode
        except OSError:
            continue  # a link to nowhere: whoever needs it will miss it
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ArgumentError(
                f"'{file}' is neither a file nor a folder but a device, pipe or socket; remove it from the"
                " model's folder"
            )
        if file.suffix == ".json" and file.stat().st_size > _JSON_BYTES and file.name != "tokenizer.json":
            raise ArgumentError(
                f"'{file}' has {file.stat().st_size:,} bytes, which is no configuration; replace it by the"
                " model's own"
            )
    config = folder / "config.json"
    if config.is_file():
        _check_layers(config)


def _check_layers(config: Path) -> None:
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ArgumentError(
            f"'{config}' is nested too deep to be a configuration; replace it by the model's own"
        ) from error
    except (OSError, ValueError):
        return  # the loader says what is wrong with it
    for name, value in layer_counts(data):
        if not 1 <= value <= LAYERS:
            raise ArgumentError(
                f"'{config}' says \"{name}\": {str(value)[:40]}, and a model has 1 to {LAYERS} layers;"
                " correct it"
            )


def check_config(config: Any, where: str) -> None:
    """Refuse a configuration, of the hub or a GGUF file too, that asks for no layer or for too many.

    Raises:
        ArgumentError: says what it asks for.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if type(layers) is int and not 1 <= layers <= LAYERS:
        raise ArgumentError(
            f"the configuration of '{where}' says that it has {layers} layers, and a model has 1 to {LAYERS};"
            " correct it"
        )


def check_sizes(model: Any, where: str) -> None:
    """Refuse a configuration of widths that no weight has: the analysis numbers every channel.

    Raises:
        ArgumentError: names the weight.
    """
    for name, tensor in model.named_parameters():
        if max(tensor.shape, default=0) > WIDTH:
            raise ArgumentError(
                f"by its configuration the weight '{name}' of '{where}' has the shape {list(tensor.shape)},"
                f" and at most {WIDTH} are served; correct it"
            )


def check_weights_fit(elements: int, folder: Path) -> None:
    """Refuse a model of more weights than the files in its folder have bits: they would be made up, and not
    fit into memory.

    Args:
        elements: the number of weights that the configuration describes.

    Raises:
        ArgumentError: says how many there are.
    """
    held = sum(
        os.stat(file).st_size for file in folder.iterdir() if file.suffix in _WEIGHTS and file.is_file()
    )
    if held and elements > 8 * held:
        raise ArgumentError(
            f"the configuration of '{folder}' describes {elements:,} weights, and its files have {held:,}"
            " bytes, too few for them; give the configuration that belongs to the weights"
        )


def check_loaded(model: Any, info: dict[str, Any], where: str) -> None:
    """Refuse a model that is not the one stored: with weights made up, left out or quantised by something
    unknown.

    Args:
        info: what transformers says of the loading.

    Raises:
        ArgumentError: names the weights.
    """
    for kind, what in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "holds in another size"),
        ("error_msgs", "cannot give"),
    ):
        found = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get(kind) or ())
        if found:
            rest = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ArgumentError(
                f"'{where}' {what} the weights {', '.join(found[:3])}{rest}, which would be made up; give the"
                " complete model"
            )
    refuse_left_out(model, info, where)
    if (
        getattr(model.config, "quantization_config", None) is not None
        and getattr(model, "hf_quantizer", None) is None
    ):
        raise ArgumentError(
            f"the configuration of '{where}' names a quantisation that transformers does not know, so the"
            ' weights cannot be read as they are meant; remove "quantization_config" if they are not'
            " quantised, or give the model before quantisation"
        )


def check_values(model: Any, where: str) -> None:
    """Refuse weights that are not finite, or so large that their squares are not: norms and statistics are
    sums of squares.

    Raises:
        ArgumentError: names the weight.
    """
    largest = torch.finfo(torch.float32).max ** 0.5
    for name, tensor in model.named_parameters():
        if not tensor.is_floating_point() or not tensor.numel() or torch.finfo(tensor.dtype).bits < 16:
            # No arithmetic on smaller ones, nor large values.
            continue
        low, high = torch.aminmax(tensor.detach())
        top = float(torch.maximum(-low, high))
        if not top <= largest:
            what = (
                f"values as large as {top:g}, whose squares no float holds"
                if top < float("inf")
                else "values that are not finite"
            )
            raise ArgumentError(f"the weight '{name}' of '{where}' holds {what}; give an undamaged model")


def check_tokens(model: Any, tokens: torch.Tensor, what: str) -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        what: what holds them, for the message.

    Raises:
        ArgumentError: names the token and the size of the vocabulary.
    """
    size = vocabulary(model)
    largest = int(tokens.max()) if tokens.numel() else 0
    if size is not None and largest >= size:
        raise ArgumentError(
            f"{what} has the token {largest}, and the model knows those from 0 to {size - 1}; give the"
            " tokenizer that belongs to the model"
        )


def vocabulary(model: Any) -> int | None:
    """How many tokens the model has embeddings for, if it says so."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    weight = getattr(table, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) else None


__all__ = [
    "check_config",
    "check_folder",
    "check_loaded",
    "check_sizes",
    "check_tokens",
    "check_values",
    "check_weights_fit",
    "vocabulary",
]
