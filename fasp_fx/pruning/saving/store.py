"""Results on disk: a folder of JSON and safetensors files, without pickle.

``graph.json`` holds the program, ``weights.safetensors`` the parameters and persistent buffers (tied ones
once), ``constants.safetensors`` the constants and other buffers, ``plan.json``, ``report.json`` and
``signature.json`` what their names say, and ``manifest.json`` the size and SHA-256 of each file. The sums
find damage, not forgery; against a forged folder, everything that torch would evaluate, import or turn into
code is checked first, as is how much of it there is (see ``fasp_fx/storage/_untrusted.py``). Operators run as
they are named, so load only what you would also run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...base._device import check_device
from ...base._json import parse
from ...base._options import path_of
from ...base._tensors import bytes_of
from ...base._tolerable import tolerable
from ...base._undisturbed import in_usual_modes, one_at_a_time
from ...capturing._signature import CallSignature
from ...errors import ArgumentError, StoreError, first_line
from ...passes._pruned_module import wrap
from ...storage._folder import kind_of, parsing, read_json, read_text, verify
from ...storage._graph_json import program_from_json
from ...storage._signature_json import signature_from_json
from ...storage._tensors import read_tensors
from .._result import Result
from ..submodules._result import PARTS, PARTS_FILES, PARTS_KIND, Layout, PartsResult, files_of, is_inside
from ..submodules._stand_in import copied, dressed, put
from ._folder import FILES, KIND, read_told


def _load_program(folder: Path, device: torch.device | None) -> Result:
    verify(folder, KIND, FILES)
    return read_program(folder, device)


#: what reads a folder, by the kind of save that it is; :mod:`fasp_fx.hf` has two more
READERS: dict[str, Callable[[Path, torch.device | None], Any]] = {KIND: _load_program}


def save(result: Result, path: str | Path, *, overwrite: bool = False) -> Path:
    """As :meth:`fasp_fx.Result.save`."""
    return result.save(path, overwrite=overwrite)


@one_at_a_time
@in_usual_modes
def load(
    path: str | Path, *, model: nn.Module | None = None, device: torch.device | str | None = None
) -> Any:
    """Read what was saved, whichever kind of folder it is.

    Args:
        path: the folder.
        model: for a model that was pruned in parts, the dense one, whose code runs between them; its weights
            do not matter, and it is left as it was.
        device: where the model shall be; ``None``: where it was, or where ``model`` is.

    Returns:
        A :class:`fasp_fx.Result`; of a folder of :mod:`fasp_fx.hf`, a plain checkpoint or not, a
        :class:`fasp_fx.hf.Pruned`.

    Raises:
        StoreError: a file is missing, damaged, or of another format; names the file and what to do.
        ArgumentError: the path is none, ``model`` is missing or not needed, or there is no such
            device here.
    """
    folder = path_of(path, "path")
    target = None if device is None else check_device(device, values=False)
    kind = kind_of(folder)
    if kind == PARTS_KIND:
        return load_parts(folder, model, target)
    if model is not None:
        raise ArgumentError(
            f"'{folder}' is no result that was pruned in parts, so it needs no model; leave model= out"
        )
    if kind not in READERS:
        raise StoreError(f"'{folder}' holds a save of the kind {kind!r:.80}, which is not known; save again")
    return READERS[kind](folder, target)


def read_program(folder: Path, device: torch.device | None) -> Result:
    """Read the files of a result, which were held against their manifest.

    Raises:
        StoreError: a file is damaged; names it and what to do.
    """
    plan, report = read_told(folder)
    signature = signature_from_json(read_text(folder / "signature.json"))
    weights, constants = (
        read_tensors(folder / f"{name}.safetensors", device) for name in ("weights", "constants")
    )
    program = program_from_json(read_json(folder / "graph.json"), weights, constants, device)
    with parsing("graph.json or signature.json"):  # each may be well-formed, and not fit the other
        return Result(wrap(program, signature), plan, report, signature)


def load_parts(folder: Path, model: nn.Module | None, device: torch.device | None) -> PartsResult:
    """Read a result of a model pruned in parts.

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
    verify(folder, PARTS_KIND, PARTS_FILES)
    layout = parse(Layout, read_text(folder / "parts.json"), "parts.json")
    places = layout.parts
    verify(folder, PARTS_KIND, files_of(len(places)))
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


__all__ = ["load", "save"]
