"""Results of models pruned in parts on disk: one save for each part, and the weights of everything around them.

``parts/0``, ``parts/1``, … are saves of :mod:`fasp_fx.store`; ``parts.json`` says where each stands in the model and what stayed whole,
``rest.safetensors`` holds the parameters and persistent buffers outside of the parts, ``plan.json``, ``report.json`` and ``signature.json`` what their
names say, and ``manifest.json`` the size and SHA-256 of each file. The code between the parts is that of the model given to :func:`load_parts`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import store
from .._calling._signature import CallSignature
from .._result import Result
from .._store._atomic import new_folder
from .._store._files import parsing
from .._store._report_json import report_to_json
from .._store._signature_json import signature_from_json, signature_to_json
from .._store._tensors import read_tensors, write_tensors
from ..errors import ArgumentError, StoreError, first_line
from ._assembly import copied
from ._result import PartsResult
from ._stand_in import dressed, put

FORMAT = "fasp_fx.parts/3"
FILES = ("parts.json", "rest.safetensors", "plan.json", "report.json", "signature.json")
_PARTS = "parts"


def save_parts(result: PartsResult, path: Path, *, overwrite: bool) -> Path:
    """Write a result to a new folder, whole or not at all (see :meth:`PartsResult.save`)."""
    path = path.absolute()
    signature = signature_to_json(result.signature)
    places = {name: _places(result.module, name, part) for name, part in result.parts.items()}
    rest = {name: value for name, value in result.module.state_dict(keep_vars=True).items() if not _inside(name, chain(*places.values()))}
    with new_folder(path, overwrite=overwrite, replaceable=_is_save) as folder:
        for index, part in enumerate(result.parts.values()):
            store.save(part, folder / _PARTS / str(index))
        store.write_json(folder / "plan.json", json.loads(result.plan.to_json()))
        store.write_json(folder / "report.json", report_to_json(result.report))
        store.write_json(folder / "signature.json", signature)
        tensors = write_tensors(folder / "rest.safetensors", rest)
        (folder / "rest.safetensors").chmod((folder / "plan.json").stat().st_mode)
        store.write_json(folder / "parts.json", {"parts": list(places.values()), "left": dict(result.left), "tensors": tensors})
        files = (*FILES, *_manifests(len(places)))
        store.write_json(folder / store.MANIFEST, {"format": FORMAT, **store.versions(), "files": {name: store.listed(folder / name) for name in files}})
    return path


def load_parts(folder: Path, model: nn.Module | None, device: torch.device | None) -> PartsResult:
    """Read a result that :func:`save_parts` wrote.

    Args:
        folder: the folder.
        model: a model of the code that was pruned; its weights do not matter, and it is left as it was.
        device: where the model shall be; ``None``: where ``model`` is.

    Raises:
        StoreError: a file is missing or damaged, or the model is not of the code that was pruned.
        ArgumentError: there is no model.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"'{folder}' holds a model pruned in parts, without the code between them; give the dense model: fasp_fx.load(path, model=model)")
    store.verify(folder, FORMAT, FILES)
    data = store.read_json(folder / "parts.json")
    try:
        places, left, entries = [[_text(path) for path in paths] for paths in data["parts"]], dict(data["left"]), data["tensors"]
        if not all(places) or not all(isinstance(text, str) for pair in left.items() for text in pair):
            raise ValueError("a part has no place, or its reason is no text")
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"parts.json is damaged: {type(error).__name__}: {error}; save the result again") from error
    store.verify(folder, FORMAT, _manifests(len(places)))
    signature = signature_from_json(store.read_json(folder / "signature.json"))
    _check_code(model, signature, places)
    try:
        made = copied(model).eval()
    except Exception as failure:
        raise StoreError(f"the model cannot be copied: {first_line(failure)}") from failure
    target = device or next((tensor.device for tensor in (*made.parameters(), *made.buffers())), None)
    made = made if device is None else made.to(device)
    parts: dict[str, Result] = {}
    for index, paths in enumerate(places):
        part = store.load(folder / _PARTS / str(index), device=target)
        with parsing(f"parts.json or {_PARTS}/{index}"):
            put(made, paths, dressed(part.module, made.get_submodule(paths[0])))
        parts[paths[0]] = part
    try:
        rest = read_tensors(folder / "rest.safetensors", entries, target)
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"parts.json does not list the tensors: {type(error).__name__}: {error}; save the result again") from error
    _fill(made, rest, list(chain(*places)))
    return PartsResult(made, store.read_plan(folder), store.read_report(folder), signature, parts, left)


def _text(path: Any) -> str:
    if not isinstance(path, str) or not path:
        raise TypeError(f"{path!r:.200} is no place in a model")
    return path


def is_parts(folder: Path) -> bool:
    """Whether a folder holds a model pruned in parts, of whatever version."""
    try:
        return str(store.read_json(folder / store.MANIFEST).get("format")).startswith("fasp_fx.parts/")
    except StoreError:
        return False


def _is_save(folder: Path) -> bool:
    known = {store.MANIFEST, _PARTS, *FILES}
    inside = folder / _PARTS
    return is_parts(folder) and all(child.name in known for child in folder.iterdir()) and (not inside.is_dir() or all(map(store.is_save, inside.iterdir())))


def _manifests(count: int) -> tuple[str, ...]:
    return tuple(f"{_PARTS}/{index}/{store.MANIFEST}" for index in range(count))


def _places(model: nn.Module, name: str, part: Result) -> list[str]:
    """Every place of a part in the model, the one by which it is known first."""
    found = [path for path, module in model.named_modules(remove_duplicate=False) if module is part.module]
    if name not in found:
        raise StoreError(f"the part '{name}' no longer stands at its place in result.module, so it cannot be saved; save before exchanging modules")
    return [name, *(path for path in found if path != name)]


def _inside(name: str, paths: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _check_code(model: nn.Module, signature: CallSignature, places: list[list[str]]) -> None:
    """Refuse a model that the parts cannot have come from."""
    own, pruned = list(inspect.signature(model.forward).parameters), list(signature.parameters.parameters)
    if own != pruned:
        raise StoreError(f"forward of this {type(model).__name__} takes {own}, that of the pruned model {pruned}; give the model that was pruned")
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: set[str] = set()
    for path in chain(*places):
        if path in seen or _inside(path, seen):
            raise StoreError(f"parts.json names '{path}' twice, or inside of another part; save the result again")
        seen.add(path)
        if path not in modules:
            raise StoreError(f"this {type(model).__name__} has no submodule '{path}', which was pruned; give the model that was pruned")


def _fill(model: nn.Module, rest: dict[str, Any], paths: list[str]) -> None:
    """Give everything around the parts the weights that it had."""
    try:
        missing, strange = model.load_state_dict(rest, strict=False)
    except RuntimeError as error:  # sizes differ
        raise StoreError(f"the weights around the parts do not fit this {type(model).__name__}: {error}; give the model that was pruned") from error
    stray = [*strange, *(name for name in missing if not _inside(name, paths))]
    if stray:
        raise StoreError(f"the weight '{stray[0]}' around the parts does not fit this {type(model).__name__}; give the model that was pruned")


__all__ = ["is_parts", "load_parts", "save_parts"]
