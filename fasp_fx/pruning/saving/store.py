"""Results on disk: a folder of JSON and safetensors files, without pickle.

``graph.json`` holds the program, ``weights.safetensors`` the parameters and persistent buffers (tied ones
once), ``constants.safetensors`` the constants and other buffers, ``plan.json``, ``report.json`` and
``signature.json`` what their names say, and ``manifest.json`` the size and SHA-256 of each file. The sums
find damage, not forgery; against a forged folder, everything that torch would evaluate, import or turn into
code is checked first, as is how much of it there is (see ``fasp_fx/storage/_untrusted.py``). Operators run as
they are named, so load only what you would also run.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn

from ...base._device import check_device
from ...base._json import parse
from ...base._options import path_of
from ...base._tolerable import tolerable
from ...base._undisturbed import in_usual_modes, one_at_a_time
from ...errors import ArgumentError, StoreError, first_line
from ...passes._pruned_module import wrap
from ...storage._folder import kind_of, parsing, read_json, read_text, verify
from ...storage._graph_json import program_from_json, signature_from_json
from ...storage._tensors import read_tensors
from .._result import Result
from ..submodules._stand_in import copied, dressed, put
from ._folder import FILES, KIND, PARTS, PARTS_FILES, PARTS_KIND, Layout, files_of, is_inside, read_told


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


def load_parts(folder: Path, model: nn.Module | None, device: torch.device | None) -> Result:
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
    verify(folder, PARTS_KIND, files_of(len(layout.parts)))
    try:
        made = copied(model).eval()
    except tolerable(Exception) as failure:
        raise StoreError(f"the model cannot be copied: {first_line(failure)}") from failure
    held, parts = chain(made.parameters(), made.buffers()), dict[str, Result]()
    target = device or next((tensor.device for tensor in held if tensor.device.type != "meta"), None)
    for index, paths in enumerate(layout.parts):
        part = read_program(folder / PARTS / str(index), target)
        try:
            put(made, paths, dressed(part.module, made.get_submodule(paths[0])))
        except AttributeError as error:
            raise _another(model, f"has no submodule '{paths[0]}', which was pruned") from error
        parts[paths[0]] = part
    _fill(made, model, read_tensors(folder / "rest.safetensors", target), list(chain(*layout.parts)))
    made = made if device is None else made.to(device)
    signature = signature_from_json(read_text(folder / "signature.json"))
    return Result(cast(fx.GraphModule, made), *read_told(folder), signature, parts, layout.left)


def _fill(made: nn.Module, model: nn.Module, rest: dict[str, Any], inside: list[str]) -> None:
    """Give everything around the parts the very weights that it had, whatever types and ties the model's
    have.
    """
    try:
        missing, strange = made.load_state_dict(rest, strict=False, assign=True)
    except tolerable(RuntimeError) as error:  # sizes differ
        raise _another(model, f"has other weights around the parts: {error}") from error
    stray = [*strange, *(name for name in missing if not is_inside(name, inside))]
    if stray:
        raise _another(model, f"has other weights around the parts, such as '{stray[0]}'")
    empty = [name for name, tensor in made.named_buffers() if tensor.device.type == "meta"]
    if empty:
        raise _another(model, f"has no values for the buffer '{empty[0]}', which was not saved")


def _another(model: nn.Module, says: str) -> StoreError:
    return StoreError(f"this {type(model).__name__} {says}; give the model that was pruned")


__all__ = ["load", "save"]
