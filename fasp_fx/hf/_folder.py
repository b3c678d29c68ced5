"""Results on disk: a folder as transformers write it, with what was removed.

A plain checkpoint is what ``save_pretrained`` of its class writes, and loads wherever one of this class
loads. Of a pruned model ``config.json``, ``generation_config.json`` and the tokenizer's files are
transformers'; ``model.safetensors`` holds the weights by the names of the original model, tied ones once;
``programs.json`` the programs, ``constants.safetensors`` what they hold besides. ``plan.json`` and
``report.json`` say of either what their names say, and ``manifest.json`` the size and SHA-256 of the files.
As with :class:`fasp_fx.Result`, everything that torch would evaluate, import or turn into code is checked
before it is.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from fasp_fx.base import attention_of, check_device
from fasp_fx.errors import ArgumentError, StoreError
from fasp_fx.pruning import TOLD, read_told, write_told
from fasp_fx.storage import (
    MANIFEST,
    kind_of,
    parsing,
    program_from_json,
    read_json,
    read_tensors,
    read_text,
    verify,
    write_json,
    write_manifest,
    write_tensors,
)

from ._arguments import LOSSES, POSITIONS, refuse
from ._config import PrunedConfig, original_of
from ._flat import FlatProgram
from ._model import Parts, PrunedModel, StoredProgram

KIND, PLAIN = "hf", "plain"
#: what makes a pruned model, and with it what else is written
FILES = ("config.json", "model.safetensors", "constants.safetensors", "programs.json", *TOLD)

_OWN = (*FILES, "generation_config.json")


def check_sums(folder: Path) -> None:
    """Hold the files that a folder's manifest lists against it, but for what is there to be read by people; a
    folder without one is not ours.

    Raises:
        StoreError: a file is missing, damaged or of another version.
    """
    if (folder / MANIFEST).is_file():
        listed = read_json(folder / MANIFEST)["files"]
        verify(folder, kind_of(folder), {*TOLD, *(name for name in listed if not name.endswith(".md"))})


def save_into(model: PrunedModel, path: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Write a pruned model to a folder that may hold other files, as a trainer's checkpoints do.

    The manifest is the last file, so that a half-replaced model is noticed.

    Raises:
        StoreError: the folder cannot be written, or a weight no longer fits the program.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        fill(path, model, state_dict)
        write_manifest(path, KIND, _OWN)
    except (OSError, safetensors.SafetensorError) as error:
        raise StoreError(f"'{path}' cannot be written: {error}; free space or choose another path") from error


def fill(folder: Path, model: PrunedModel, state_dict: Mapping[str, Tensor] | None) -> None:
    """Write the files of a pruned model, but for its manifest; ``state_dict``: with other weights.

    Raises:
        StoreError: a weight no longer fits the program, or the program holds something that cannot be stored.
    """
    weights = _weights(model, state_dict)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    names = (name for constants in model._constant_names.values() for name in constants.values())
    write_tensors(folder / "model.safetensors", weights)
    write_tensors(folder / "constants.safetensors", {name: buffers[name] for name in names})
    programs = {
        name: {**program.data, "constants": model._constant_names[name]}
        for name, program in model._stored.items()
    }
    write_json(folder / "programs.json", programs)
    write_told(folder, model.plan, model.report)


def _weights(model: PrunedModel, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The weights to write, held against those that the programs need."""
    weights: dict[str, Tensor] = model.state_dict(keep_vars=True)
    values = weights if state_dict is None else state_dict
    checked: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        value = values.get(name)
        if value is None or (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
            raise StoreError(
                f"'{name}' of state_dict is missing, or not {tensor.dtype} {list(tensor.shape)} as the"
                " programs need it; pass the model's own state_dict()"
            )
        is_parameter = isinstance(tensor, nn.Parameter)
        checked[name] = nn.Parameter(value.detach(), tensor.requires_grad) if is_parameter else value
    return checked


#: fields of a configuration that say what the programs are
_OF_THE_PROGRAMS = ("original", "positions", "loss", "labels_moved", "fasp_fx_version", "is_encoder_decoder")
#: arguments of transformers' loaders that change nothing here
_WITHOUT_EFFECT = {
    *("trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "adapter_kwargs", "_from_auto"),
    *("_from_pipeline", "weights_only", "proxies", "use_kernels", "cache_dir", "force_download"),
    *("local_files_only", "revision", "token"),
}


def _parts(folder: Path, device: torch.device) -> Parts:
    programs = read_json(folder / "programs.json")
    weights = read_tensors(folder / "model.safetensors", device)
    tensors = read_tensors(folder / "constants.safetensors", device)
    constants: dict[str, dict[str, Tensor]] = {}
    stored_programs: dict[str, StoredProgram] = {}
    with parsing("programs.json"):
        for name, stored in programs.items():
            constants[name] = {inside: tensors[outside] for inside, outside in stored["constants"].items()}
            kept = {"program": stored["program"]}
            module = program_from_json(kept, weights, constants[name], device).module(check_guards=False)
            stored_programs[name] = StoredProgram(kept, FlatProgram.of(module))
    return Parts(stored_programs, weights, constants, *read_told(folder))


def _config(folder: Path) -> PrunedConfig:
    with parsing("config.json"):
        config = PrunedConfig.from_pretrained(folder)
    if not isinstance(config.original, dict):
        raise StoreError(
            "config.json does not hold the configuration of the model that was pruned; save the model again"
        )
    original_of(config)
    for name, ways in (("positions", POSITIONS), ("loss", LOSSES)):
        if getattr(config, name) not in (None, *ways):
            raise StoreError(
                f"config.json does not say how the model is called ({name}); save the model again"
            )
    return config


def _overridden(saved: PrunedConfig, changed: Any) -> PrunedConfig:
    """The configuration as the caller has changed it, as transformers takes it; what it says of the programs
    stays as it was saved.
    """
    if not isinstance(changed, PrunedConfig):
        return saved
    config = copy.deepcopy(changed)
    for name in (*_OF_THE_PROGRAMS, "dtype"):
        setattr(config, name, getattr(saved, name))
    return config


def _device(device_map: Any) -> torch.device:
    if device_map == "auto":
        device_map = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return torch.get_default_device() if device_map is None else check_device(device_map, values=False)


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
        """Load a folder that ``save_pretrained`` wrote.

        Args:
            pretrained_model_name_or_path: the folder; of a repository on the hub, what
                ``huggingface_hub.snapshot_download`` made of it.
            dtype: ``None``, ``"auto"`` or the dtype that the model was captured in; another one is refused.
            device_map: ``None``, ``"auto"`` (the accelerator if there is one), or a device.

        Raises:
            StoreError: a file is missing, damaged or of another version.
            ArgumentError: an argument cannot be honoured.
        """
        folder = Path(pretrained_model_name_or_path) / (options.pop("subfolder", "") or "")
        refuse(options, known=_WITHOUT_EFFECT)
        # The Auto classes put it there; a pruned model says "sdpa" of itself.
        if (asked := attention_of(config)) not in (None, "sdpa"):
            raise ArgumentError(
                f"attn_implementation={asked!r} cannot be had: the programs fix attention; choose it for the"
                " dense model and prune it again"
            )
        verify(folder, KIND, FILES)
        verify(folder, KIND, {"generation_config.json"} & read_json(folder / MANIFEST)["files"].keys())
        device = _device(device_map)
        saved = _overridden(_config(folder), config)
        wanted = dtype if dtype is not None else torch_dtype
        wanted = getattr(torch, wanted, wanted) if isinstance(wanted, str) else wanted
        if wanted not in (None, "auto", saved.dtype):
            raise ArgumentError(
                f"dtype={wanted} cannot be had: the programs were captured in {saved.dtype}; load the dense"
                " model in that dtype and prune it again"
            )
        parts = _parts(folder, device)
        if set(parts.programs) != cls.program_names:
            auto = "AutoModelForSeq2SeqLM" if saved.is_encoder_decoder else "AutoModelForCausalLM"
            raise StoreError(
                f"programs.json holds the programs {sorted(parts.programs)!r:.200}, not those of a"
                f" {cls.__name__}, {sorted(cls.program_names)}; load it with {auto}, or save the model again"
            )
        with parsing("programs.json or config.json"):
            model = cls(saved, parts)
        if os.path.lexists(folder / "generation_config.json"):
            with parsing("generation_config.json"):
                read_text(folder / "generation_config.json")
                model.generation_config = model.generation_config_class.from_pretrained(folder)
        model.name_or_path = str(pretrained_model_name_or_path)
        return model
