"""Read a pruned model from the folder that :mod:`._folder` wrote, and the base class of those that are saved
and loaded as transformers' are.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ..base._device import check_device
from ..base._json import parse
from ..base._tolerable import tolerable
from ..errors import ArgumentError, StoreError, first_line
from ..pruning.saving._folder import read_told
from ..storage._folder import parsing, read_text, verify
from ..storage._graph_json import program_from_json
from ..storage._tensors import read_tensors
from ._arguments import LOSSES, MOVES, POSITIONS
from ._config import PrunedConfig, check_layers, original_of
from ._flat import FlatProgram
from ._folder import FILES, KIND, save_into
from ._model import Parts, PrunedModel, StoredProgram

#: fields of a configuration that say what the programs are
_OF_THE_PROGRAMS = ("original", "positions", "loss", "labels_moved", "fasp_fx_version", "is_encoder_decoder")
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


def _parts(folder: Path, device: torch.device) -> Parts:
    programs = parse(dict[str, _Stored], read_text(folder / "programs.json"), "programs.json")
    weights = read_tensors(folder / "model.safetensors", device)
    held = read_tensors(folder / "constants.safetensors", device)
    constants: dict[str, dict[str, Tensor]] = {}
    made: dict[str, StoredProgram] = {}
    with parsing("programs.json"):
        for name, stored in programs.items():
            constants[name] = {inside: held[outside] for inside, outside in stored.constants.items()}
            kept = {"program": stored.program, "example": stored.example}
            module = program_from_json(kept, weights, constants[name], device).module(check_guards=False)
            made[name] = StoredProgram(kept, FlatProgram.of(module))
    return Parts(made, weights, constants, *read_told(folder))


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
    for name, ways in (("positions", POSITIONS), ("loss", LOSSES), ("labels_moved", MOVES)):
        if getattr(config, name) not in (None, *ways):
            raise StoreError(
                f"config.json does not say how the model is called ({name}); save the model again"
            )
    named = config.architectures if isinstance(config.architectures, list) else []
    (expected, *_) = [*named, None]
    if kind.__name__ != expected:
        auto = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
        raise ArgumentError(f"'{folder}' holds a {expected}, not a {kind.__name__}; load it with {auto}")
    return config


def _overridden(found: PrunedConfig, given: Any) -> PrunedConfig:
    """The configuration as the caller has changed it, as transformers takes it.

    Raises:
        ArgumentError: a change speaks of the programs, which are what they are.
    """
    if not isinstance(given, PrunedConfig):
        return found
    changed = [name for name in _OF_THE_PROGRAMS if getattr(given, name) != getattr(found, name)]
    if changed:
        raise ArgumentError(
            f"'{changed[0]}' of the configuration cannot be changed: it describes the pruned programs; leave"
            " it as it was saved"
        )
    made = copy.deepcopy(given)
    made.dtype = found.dtype
    return made


def _device(device_map: Any) -> torch.device:
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return torch.get_default_device()
    if device_map == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return check_device(device_map, values=False)
    except ArgumentError as error:
        raise ArgumentError(
            f"device_map={device_map!r} cannot be honoured: a pruned model lies on one device; pass 'auto' or"
            " a device such as 'cpu'"
        ) from error


class SavedModel(PrunedModel):
    """A pruned model with a folder of its own format."""

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the model as it is now to a folder, which may exist already, as transformers' models do.

        The files are complete before the first of them takes its place. See
        :meth:`fasp_fx.hf.Pruned.save_pretrained` for a folder that appears whole or not at all, with the
        tokenizer.

        Args:
            state_dict: weights to write instead of the model's own, by the same names.

        Raises:
            StoreError: the folder cannot be written, or a weight no longer fits the program.
        """
        if is_main_process:
            save_into(self, Path(save_directory), state_dict)
        if push_to_hub:
            raise ArgumentError(
                "push_to_hub=True is not served; call save_pretrained(folder), then"
                " huggingface_hub.upload_folder"
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = None,
        **options: Any,
    ) -> Any:
        """Load a folder that ``save_pretrained`` wrote, or a repository on the hub that holds one.

        Args:
            pretrained_model_name_or_path: the folder, or a hub id.
            dtype: ``None``, ``"auto"`` or the dtype that the model was captured in; another one is refused.
            device_map: ``None``, ``"auto"`` (the accelerator if there is one), a device, or ``{"": device}``.

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
        folder = _folder(pretrained_model_name_or_path, hub) / subfolder
        verify(folder, KIND, FILES)
        device = _device(device_map)
        found = _overridden(_config(folder, cls), config)
        wanted = dtype if dtype is not None else torch_dtype
        wanted = getattr(torch, wanted, wanted) if isinstance(wanted, str) else wanted
        if wanted not in (None, "auto", found.dtype):
            raise ArgumentError(
                f"dtype={wanted} cannot be had: the programs were captured in {found.dtype}; load the dense"
                " model in that dtype and prune it again"
            )
        parts = _parts(folder, device)
        if set(parts.programs) != cls.program_names:
            raise StoreError(
                f"programs.json holds the programs {sorted(parts.programs)!r:.200}, not"
                f" {sorted(cls.program_names)}; save the model again"
            )
        with parsing("programs.json or config.json"):
            model = cls(found, parts)
        generation = folder / "generation_config.json"
        if os.path.lexists(generation):
            with parsing("generation_config.json"):
                read_text(generation)
                model.generation_config = model.generation_config_class.from_pretrained(folder)
        model.name_or_path = str(pretrained_model_name_or_path)
        return model
