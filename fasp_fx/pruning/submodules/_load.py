"""Results of models pruned in parts from disk (:mod:`._save` says what the files hold)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...base._fingerprint import bytes_of
from ...base._json import parse
from ...base._tolerable import tolerable
from ...capturing.calling._signature import CallSignature
from ...errors import ArgumentError, StoreError, first_line
from ...storage._folder import parsing, read_text, verify
from ...storage._signature_json import signature_from_json
from ...storage._tensors import read_tensors
from .._result import Result
from ..saving._folder import read_told
from ..saving._load import read_program
from ._result import PartsResult
from ._save import FILES, KIND, PARTS, Layout, files_of, is_inside
from ._stand_in import dressed, put
from ._whole import copied


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
        raise ArgumentError(
            f"'{folder}' holds a model pruned in parts, without the code between them; give the dense model:"
            " fasp_fx.load(path, model=model)"
        )
    verify(folder, KIND, FILES)
    layout = parse(Layout, read_text(folder / "parts.json"), "parts.json")
    places = layout.parts
    verify(folder, KIND, files_of(len(places)))
    signature = signature_from_json(read_text(folder / "signature.json"))
    _check_code(model, signature, places)
    try:
        made = copied(model).eval()
    except tolerable(Exception) as failure:
        raise StoreError(f"the model cannot be copied: {first_line(failure)}") from failure
    target = device or next((tensor.device for tensor in (*made.parameters(), *made.buffers())), None)
    made = made if device is None else made.to(device)
    parts: dict[str, Result] = {}
    for index, paths in enumerate(places):
        part = read_program(folder / PARTS / str(index), target)
        with parsing(f"parts.json or {PARTS}/{index}"):
            put(made, paths, dressed(part.module, made.get_submodule(paths[0])))
        parts[paths[0]] = part
    _fill(made, read_tensors(folder / "rest.safetensors", target), list(chain(*places)))
    return PartsResult(made, *read_told(folder), signature, parts, layout.left)


def _check_code(model: nn.Module, signature: CallSignature, places: list[list[str]]) -> None:
    """Refuse a model that the parts cannot have come from."""
    own, pruned = list(inspect.signature(model.forward).parameters), list(signature.parameters.parameters)
    if own != pruned:
        raise StoreError(
            f"forward of this {type(model).__name__} takes {own}, that of the pruned model {pruned}; give the"
            " model that was pruned"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: set[str] = set()
    for path in chain(*places):
        if path in seen or is_inside(path, seen):
            raise StoreError(
                f"parts.json names '{path}' twice, or inside of another part; save the result again"
            )
        seen.add(path)
        if path not in modules:
            raise StoreError(
                f"this {type(model).__name__} has no submodule '{path}', which was pruned; give the model"
                " that was pruned"
            )


def _fill(model: nn.Module, rest: dict[str, Any], paths: list[str]) -> None:
    """Give everything around the parts the weights that it had."""
    _check_takes(model.state_dict(keep_vars=True), rest)
    try:
        missing, strange = model.load_state_dict(rest, strict=False)
    except tolerable(RuntimeError) as error:  # sizes differ
        raise StoreError(
            f"the weights around the parts do not fit this {type(model).__name__}: {error}; give the model"
            " that was pruned"
        ) from error
    stray = [*strange, *(name for name in missing if not is_inside(name, paths))]
    if stray:
        raise StoreError(
            f"the weight '{stray[0]}' around the parts does not fit this {type(model).__name__}; give the"
            " model that was pruned"
        )


def _check_takes(own: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Refuse a model whose weights cannot hold the values of those that were saved: loading casts them, and
    writes two weights into one that is both without a word.
    """
    holders: dict[int, str] = {}
    for name, tensor in rest.items():
        held = own.get(name)
        if not isinstance(held, Tensor) or not isinstance(tensor, Tensor):
            continue
        if held.device.type == "meta":
            raise StoreError(
                f"'{name}' of the model that was given is on the meta device; give a model with weights, of"
                " whatever values"
            )
        if held.dtype != tensor.dtype:
            raise StoreError(
                f"'{name}' is {held.dtype} in the model that was given and {tensor.dtype} in the saved one;"
                f" give model.to({tensor.dtype})"
            )
        other = holders.setdefault(id(held), name)
        if other != name and not _alike(rest[other], tensor):
            raise StoreError(
                f"'{other}' and '{name}' are one weight in the model that was given and two in the saved one;"
                " give the model that was pruned"
            )


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(bytes_of(a), bytes_of(b))


__all__ = ["load_parts"]
