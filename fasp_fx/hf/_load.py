"""Read a pruned model from the folder that :mod:`._folder` wrote."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ..base._json import parse
from ..base._tolerable import tolerable
from ..errors import ArgumentError, StoreError, first_line
from ..pruning.saving._folder import read_told
from ..storage._folder import parsing, read_text, verify
from ..storage._graph_json import program_from_json
from ..storage._tensors import read_tensors
from ._config import PrunedConfig, check_layers, original_of
from ._flat import FlatProgram
from ._folder import FILES, KIND
from ._held import Parts, StoredProgram, Written
from ._labels import LOSSES, MOVES, POSITIONS
from ._model import PrunedModel

#: fields of a configuration that say where a model came from, or are options of their own
_OF_THE_FOLDER = {
    *("_name_or_path", "transformers_version", "architectures", "attn_implementation"),
    *("_attn_implementation", "dtype", "torch_dtype"),
}
#: fields that say what the programs are
_OF_THE_PROGRAMS = {
    *("original", "positions", "position_limit", "loss", "labels_moved", "counts_items", "packs"),
    *("fasp_fx_version", "is_encoder_decoder", "model_type"),
}
_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
#: arguments of transformers' loaders that change nothing here
_WITHOUT_EFFECT = {
    *("trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "adapter_kwargs", "_from_auto"),
    *("_from_pipeline", "weights_only", "proxies", "use_kernels"),
}


@dataclass(frozen=True)
class _Stored:
    """One of the programs in a file: as :mod:`fasp_fx.store` writes it, with the names of its constants."""

    program: dict[str, Any]
    example: list[Any]
    constants: dict[str, str]


def load(
    kind: type[PrunedModel],
    where: Any,
    *,
    config: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    device_map: Any = None,
    **options: Any,
) -> Any:
    """Read a model; see :meth:`PrunedModel.from_pretrained`.

    Raises:
        StoreError: a file is missing, damaged or of another version.
        ArgumentError: an argument cannot be honoured.
    """
    hub = {name: value for name in _HUB if (value := options.pop(name, None)) is not None}
    subfolder = options.pop("subfolder", "") or ""
    for name, value in options.items():
        if value is not None and name not in _WITHOUT_EFFECT:
            raise ArgumentError(
                f"argument '{name}' is not served when a pruned model is loaded; leave it out"
            )
    asked = getattr(config, "_attn_implementation", None)  # where the Auto classes put it
    if asked not in (None, "sdpa"):  # what a pruned model says of itself
        raise ArgumentError(
            f"attn_implementation={asked!r} cannot be had: the programs fix attention; choose it for the"
            " dense model and prune it again"
        )
    folder = _folder(where, hub) / subfolder
    verify(folder, KIND, FILES)
    device = _device(device_map)
    found = _config(folder, kind)
    _override(found, config)
    _check_dtype(found, dtype if dtype is not None else torch_dtype)
    parts = _parts(folder, device)
    if set(parts.programs) != kind.program_names:
        raise StoreError(
            f"programs.json holds the programs {sorted(parts.programs)!r:.200}, not"
            f" {sorted(kind.program_names)}; save the model again"
        )
    with parsing("programs.json or config.json"):
        model = kind(found, parts)
    generation = folder / "generation_config.json"
    if os.path.lexists(generation):
        with parsing("generation_config.json"):
            read_text(generation)
            model.generation_config = model.generation_config_class.from_pretrained(folder)
    model.name_or_path = str(where)
    return model


def _parts(folder: Path, device: torch.device) -> Parts:
    programs = parse(dict[str, _Stored], read_text(folder / "programs.json"), "programs.json")
    weights = read_tensors(folder / "model.safetensors", device)
    held = read_tensors(folder / "constants.safetensors", device)
    with parsing("programs.json"):
        constants = {
            name: {inside: held[outside] for inside, outside in stored.constants.items()}
            for name, stored in programs.items()
        }
        made = {name: _program(stored, weights, constants[name], device) for name, stored in programs.items()}
    return Parts(made, weights, constants, *read_told(folder))


def _program(
    stored: _Stored, weights: dict[str, Tensor], constants: dict[str, Tensor], device: torch.device
) -> StoredProgram:
    kept = {"program": stored.program, "example": stored.example}
    module = program_from_json(kept, weights, constants, device).module(check_guards=False)
    return StoredProgram(Written(kept), FlatProgram.of(module))


def _folder(where: Any, hub: dict[str, Any]) -> Path:
    if os.path.isdir(where):
        return Path(where)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(where), **hub))
    except tolerable(Exception) as error:  # the hub's client raises what its transport does
        raise StoreError(
            f"'{where}' is neither a folder nor a repository that can be read: {first_line(error)}; give the"
            " folder that save_pretrained wrote"
        ) from error


def _config(folder: Path, kind: type[PrunedModel]) -> PrunedConfig:
    with parsing("config.json"):
        config = PrunedConfig.from_pretrained(folder)
    if not isinstance(config.original, dict):
        raise StoreError(
            "config.json does not hold the configuration of the model that was pruned; save the model again"
        )
    with parsing("config.json"), safetensors.safe_open(folder / "model.safetensors", "pt") as weights:
        check_layers(config.original, len(weights.keys()))
    original_of(config)
    allowed = {
        "positions": (None, *POSITIONS),
        "loss": (None, *LOSSES),
        "labels_moved": (None, *MOVES),
        "packs": (True, False),
        "counts_items": (True, False),
    }
    odd = [name for name, values in allowed.items() if getattr(config, name) not in values]
    if odd or type(config.position_limit) not in (int, type(None)):
        raise StoreError(
            f"config.json does not say how the model is called ({[*odd, 'position_limit'][0]}); save the"
            " model again"
        )
    named = config.architectures if isinstance(config.architectures, list) else []
    (expected, *_) = [*named, None]
    if kind.__name__ != expected:
        auto = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
        raise ArgumentError(f"'{folder}' holds a {expected}, not a {kind.__name__}; load it with {auto}")
    return config


def _override(found: PrunedConfig, given: Any) -> None:
    """Take over what the caller has changed of the configuration, as transformers does.

    Raises:
        ArgumentError: a change speaks of the programs, which are what they are.
    """
    if not isinstance(given, PrunedConfig):
        return
    stored = found.to_dict()
    for name, value in given.to_dict().items():
        if name in _OF_THE_FOLDER or stored.get(name) == value:
            continue
        if name in _OF_THE_PROGRAMS:
            raise ArgumentError(
                f"'{name}' of the configuration cannot be changed: it describes the pruned programs; leave it"
                " as it was saved"
            )
        setattr(found, name, value)


def _check_dtype(config: PrunedConfig, asked: Any) -> None:
    asked = getattr(torch, asked, asked) if isinstance(asked, str) and asked != "auto" else asked
    if asked not in (None, "auto", config.dtype):
        raise ArgumentError(
            f"dtype={asked} cannot be had: the programs were captured in {config.dtype}; load the dense model"
            " in that dtype and prune it again"
        )


def _device(device_map: Any) -> torch.device:
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return torch.get_default_device()
    if device_map == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(device_map)
        torch.empty(0, device=device)
    except tolerable(RuntimeError, AssertionError, TypeError) as error:
        raise ArgumentError(
            f"device_map={device_map!r} cannot be honoured: a pruned model lies on one device; pass 'auto' or"
            " a device such as 'cpu'"
        ) from error
    return device


__all__ = ["load"]
