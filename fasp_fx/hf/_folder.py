"""Pruned models on disk: a folder as transformers write it, with the programs beside the weights.

``config.json``, ``generation_config.json`` and the tokenizer's files are transformers'; ``model.safetensors`` holds the weights by the names of
the original model, tied ones once; ``programs.json`` the programs, ``constants.safetensors`` what they hold besides, ``plan.json`` and
``report.json`` what their names say, and ``manifest.json`` the size and SHA-256 of those that belong together. As with :mod:`fasp_fx.store`,
everything that torch would evaluate, import or turn into code is checked before it is.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import store
from .._atomic import new_folder
from .._graph_json import program_from_json
from .._report_json import report_to_json
from .._tensors import read_tensors, write_tensors
from ..errors import ArgumentError, PlanError, StoreError, first_line
from ..plan import PruningPlan
from ._card import card
from ._config import PrunedConfig
from ._flat import FlatProgram
from ._model import Parts, PrunedModel, StoredProgram

FORMAT = "fasp_fx.hf/1"
FILES = ("config.json", "model.safetensors", "constants.safetensors", "programs.json", "plan.json", "report.json")
_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
#: arguments of transformers' loaders that change nothing here
_WITHOUT_EFFECT = (
    "trust_remote_code",
    "low_cpu_mem_usage",
    "use_safetensors",
    "adapter_kwargs",
    "_from_auto",
    "_from_pipeline",
    "weights_only",
    "proxies",
    "use_kernels",
)


def save(model: PrunedModel, path: Path, tokenizer: Any, *, overwrite: bool) -> Path:
    """Write a model and its tokenizer to a new folder, whole or not at all.

    Raises:
        StoreError: the path is taken or cannot be written, or the model holds something that cannot be stored.
    """
    path = path.absolute()
    with new_folder(path, overwrite=overwrite, replaceable=is_saved) as folder:
        _fill(folder, model, None)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        _write_manifest(folder)
    return path


def save_into(model: PrunedModel, path: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Write a model to a folder that may hold other files, as a trainer's checkpoints do.

    The files are written aside first; the manifest is the last to take its place, so that a half-replaced model is noticed.

    Raises:
        StoreError: the folder cannot be written, or a weight no longer fits the program.
    """
    path = path.absolute()
    if path.is_file():
        raise StoreError(f"'{path}' is a file; give a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise StoreError(f"'{path}' cannot be written: {error}; choose another path") from error
    try:
        _fill(aside, model, state_dict)
        _write_manifest(aside)
        path.mkdir(exist_ok=True)
        for file in sorted(aside.iterdir(), key=lambda file: file.name == store.MANIFEST):
            os.replace(file, path / file.name)
    except OSError as error:
        raise StoreError(f"'{path}' cannot be written: {error}; free space or choose another path") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def is_saved(folder: Path) -> bool:
    """Whether a folder holds a pruned model and nothing besides."""
    try:
        manifest = store.read_json(folder / store.MANIFEST)
    except StoreError:
        return False
    known = {store.MANIFEST, *FILES, *manifest.get("written", ())}
    return holds_model(folder) and all(child.name in known for child in folder.iterdir())


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a pruned model, of whatever version."""
    try:
        return str(store.read_json(folder / store.MANIFEST).get("format")).startswith("fasp_fx.hf/")
    except StoreError:
        return False


def _fill(folder: Path, model: PrunedModel, state_dict: Mapping[str, Tensor] | None) -> None:
    weights = _weights(model, state_dict)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    store.write_json(folder / "plan.json", json.loads(model.plan.to_json()))
    store.write_json(folder / "report.json", report_to_json(model.report))
    mode = (folder / "plan.json").stat().st_mode
    buffers = dict(model.named_buffers(remove_duplicate=False))
    held = {name: buffers[name] for names in model._constant_names.values() for name in names.values()}
    tensors = {}
    for name, tree in (("model", weights), ("constants", held)):
        file = folder / f"{name}.safetensors"
        tensors[name] = write_tensors(file, tree, metadata={"format": "pt"})
        file.chmod(mode)
    programs = {name: {**data, "constants": model._constant_names[name]} for name, data in model._parts.items()}
    store.write_json(folder / "programs.json", {"programs": programs, "tensors": tensors})
    (folder / "README.md").write_text(card(model), encoding="utf-8")


def _weights(model: PrunedModel, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The weights to write, held against those that the programs need."""
    kept = model.state_dict().keys()
    own: dict[str, Tensor] = {
        name: tensor for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)) if name in kept
    }
    if state_dict is None:
        return own
    found: dict[int, Tensor] = {}
    for name, tensor in own.items():
        given = state_dict.get(name)
        if given is None or given.shape != tensor.shape or given.dtype != tensor.dtype:
            shown = "missing" if given is None else f"{given.dtype} {list(given.shape)}"
            raise StoreError(f"'{name}' of state_dict is {shown}, the programs need {tensor.dtype} {list(tensor.shape)}; pass the model's own state_dict()")
        made = given.detach()
        found.setdefault(id(tensor), nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made)
    return {name: found[id(tensor)] for name, tensor in own.items()}


def _write_manifest(folder: Path) -> None:
    written = sorted(child.name for child in folder.iterdir())
    listed = {name: store.listed(folder / name) for name in FILES}
    store.write_json(folder / store.MANIFEST, {"format": FORMAT, **store.versions(), "files": listed, "written": written})


def load(kind: type[PrunedModel], where: Any, *, config: Any = None, dtype: Any = None, torch_dtype: Any = None, device_map: Any = None, **options: Any) -> Any:
    """Read a model; see :meth:`PrunedModel.from_pretrained`.

    Raises:
        StoreError: a file is missing, damaged or of another version.
        ArgumentError: an argument cannot be honoured.
    """
    hub = {name: options.pop(name) for name in _HUB if name in options}
    subfolder = options.pop("subfolder", "") or ""
    for name, value in options.items():
        if value is not None and name not in _WITHOUT_EFFECT:
            raise ArgumentError(f"argument '{name}' is not served when a pruned model is loaded; leave it out")
    folder = _folder(where, hub) / subfolder
    store.verify(folder, FORMAT, FILES)
    device = _device(device_map)
    programs = store.read_json(folder / "programs.json")
    found = _config(folder, kind)
    _check_dtype(found, dtype if dtype is not None else torch_dtype)
    model = kind(found, _parts(folder, programs, device))
    generation = folder / "generation_config.json"
    if generation.is_file():
        model.generation_config = _read(lambda: model.generation_config_class.from_pretrained(folder), "generation_config.json")
    model.name_or_path = str(where)
    return model


def _parts(folder: Path, programs: dict[str, Any], device: torch.device) -> Parts:
    try:
        plan = PruningPlan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    except PlanError as error:
        raise StoreError(f"plan.json is damaged: {error}; save the model again") from error
    report = store.read_report(folder)
    try:
        weights = read_tensors(folder / "model.safetensors", programs["tensors"]["model"], device)
        held = read_tensors(folder / "constants.safetensors", programs["tensors"]["constants"], device)
        stored, constants = {}, {}
        for name, data in programs["programs"].items():
            constants[name] = {inside: held[outside] for inside, outside in data["constants"].items()}
            stored[name] = StoredProgram(*_program(data, weights, constants[name], device))
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"programs.json does not fit the folder: {type(error).__name__}: {error}; save the model again") from error
    return Parts(stored, weights, constants, plan, report)


def _program(data: dict[str, Any], weights: dict[str, Tensor], constants: dict[str, Tensor], device: torch.device) -> tuple[dict[str, Any], FlatProgram]:
    kept = {"program": data["program"], "example": data["example"]}
    program = program_from_json(kept, weights, constants, device)
    return kept, FlatProgram.of(program.module(check_guards=False))


def _folder(where: Any, hub: dict[str, Any]) -> Path:
    if os.path.isdir(where):
        return Path(where)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(where), **{name: value for name, value in hub.items() if value is not None}))
    except Exception as error:  # the hub's client raises what its transport does
        raise StoreError(
            f"'{where}' is neither a folder nor a repository that can be read: {first_line(error)}; give the folder that save_pretrained wrote"
        ) from error


def _config(folder: Path, kind: type[PrunedModel]) -> PrunedConfig:
    config = _read(lambda: PrunedConfig.from_pretrained(folder), "config.json")
    expected = (config.architectures or [None])[0]
    if kind.__name__ != expected:
        auto = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
        raise ArgumentError(f"'{folder}' holds a {expected}, not a {kind.__name__}; load it with {auto}")
    return config


def _read(read: Any, name: str) -> Any:
    try:
        return read()
    except Exception as error:  # transformers' readers raise whatever the file makes them trip over
        raise StoreError(f"{name} cannot be read: {first_line(error)}; save the model again") from error


def _check_dtype(config: PrunedConfig, asked: Any) -> None:
    asked = getattr(torch, asked, asked) if isinstance(asked, str) and asked != "auto" else asked
    if asked not in (None, "auto", config.dtype):
        raise ArgumentError(f"dtype={asked} cannot be had: the programs were captured in {config.dtype}; load the dense model in that dtype and prune it again")


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
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ArgumentError(
            f"device_map={device_map!r} cannot be honoured: a pruned model lies on one device; pass 'auto' or a device such as 'cpu'"
        ) from error
    return device


__all__ = ["FILES", "FORMAT", "holds_model", "is_saved", "load", "save", "save_into"]
