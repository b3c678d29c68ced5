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
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...base._device import check_device
from ...base._options import path_of
from ...base._undisturbed import in_usual_modes, one_at_a_time
from ...errors import ArgumentError, StoreError
from ...storage._folder import kind_of, verify
from .._result import Result
from ..submodules._load import load_parts
from . import _folder
from ._load import read_program


def _load_program(folder: Path, device: torch.device | None) -> Result:
    verify(folder, _folder.KIND, _folder.FILES)
    return read_program(folder, device)


#: what reads a folder, by the kind of save that it is; :mod:`fasp_fx.hf` has two more
READERS: dict[str, Callable[[Path, torch.device | None], Any]] = {_folder.KIND: _load_program}


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
    if kind == "parts":
        return load_parts(folder, model, target)
    if model is not None:
        raise ArgumentError(
            f"'{folder}' is no result that was pruned in parts, so it needs no model; leave model= out"
        )
    if kind not in READERS:
        raise StoreError(f"'{folder}' holds a save of the kind {kind!r:.80}, which is not known; save again")
    return READERS[kind](folder, target)


__all__ = ["load", "save"]
