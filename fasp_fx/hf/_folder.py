"""Pruned models on disk: a folder as transformers write it, with the programs beside the weights.

``config.json``, ``generation_config.json`` and the tokenizer's files are transformers'; ``model.safetensors``
holds the weights by the names of the original model, tied ones once; ``programs.json`` the programs,
``constants.safetensors`` what they hold besides, ``plan.json`` and ``report.json`` what their names say, and
``manifest.json`` the size and SHA-256 of those that belong together. As with :mod:`fasp_fx.store`, everything
that torch would evaluate, import or turn into code is checked before it is.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import StoreError
from ..pruning.saving._folder import TOLD, write_told
from ..storage._folder import MANIFEST, new_save, write_json, write_manifest
from ..storage._tensors import write_tensors
from ._card import card
from ._model import PrunedModel

KIND = "hf"
FILES = ("config.json", "model.safetensors", "constants.safetensors", "programs.json", *TOLD)


def save(model: PrunedModel, path: Path, tokenizer: Any, *, overwrite: bool) -> Path:
    """Write a model and its tokenizer to a new folder, whole or not at all.

    Raises:
        StoreError: the path is taken or cannot be written, or the model holds something that cannot be
            stored.
    """
    path = path.absolute()
    with new_save(path, KIND, overwrite=overwrite) as folder:
        _fill(folder, model, None)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
    return path


def save_into(model: PrunedModel, path: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Write a model to a folder that may hold other files, as a trainer's checkpoints do.

    The files are written aside first; the manifest is the last to take its place, so that a half-replaced
    model is noticed.

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
        write_manifest(aside, KIND)
        path.mkdir(exist_ok=True)
        for file in sorted(aside.iterdir(), key=lambda file: file.name == MANIFEST):
            os.replace(file, path / file.name)
    except OSError as error:
        raise StoreError(f"'{path}' cannot be written: {error}; free space or choose another path") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fill(folder: Path, model: PrunedModel, state_dict: Mapping[str, Tensor] | None) -> None:
    weights = _weights(model, state_dict)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    write_told(folder, model.plan, model.report)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    names = (name for held in model._constant_names.values() for name in held.values())
    write_tensors(folder / "model.safetensors", weights)
    write_tensors(folder / "constants.safetensors", {name: buffers[name] for name in names})
    programs = {
        name: {**written.data, "constants": model._constant_names[name]}
        for name, written in model._written.items()
    }
    write_json(folder / "programs.json", programs)
    (folder / "README.md").write_text(card(model), encoding="utf-8")


def _weights(model: PrunedModel, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The weights to write, held against those that the programs need."""
    kept = model.state_dict().keys()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    own: dict[str, Tensor] = {name: tensor for name, tensor in named if name in kept}
    if state_dict is None:
        return own
    found: dict[int, Tensor] = {}
    for name, tensor in own.items():
        given = state_dict.get(name)
        if given is None or given.shape != tensor.shape or given.dtype != tensor.dtype:
            shown = "missing" if given is None else f"{given.dtype} {list(given.shape)}"
            raise StoreError(
                f"'{name}' of state_dict is {shown}, the programs need {tensor.dtype} {list(tensor.shape)};"
                " pass the model's own state_dict()"
            )
        made = given.detach()
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        found.setdefault(id(tensor), made)
    return {name: found[id(tensor)] for name, tensor in own.items()}


__all__ = ["FILES", "KIND", "save", "save_into"]
