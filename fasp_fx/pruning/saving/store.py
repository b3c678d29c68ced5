"""Results on disk: a folder of JSON and safetensors files, without pickle.

``graph.json`` holds the program, ``weights.safetensors`` the parameters and persistent buffers (tied ones
once), ``constants.safetensors`` the constants and other buffers, ``plan.json``, ``report.json`` and
``signature.json`` what their names say, and ``manifest.json`` the size and SHA-256 of each file. The sums
find damage, not forgery; against a forged folder, everything that torch would evaluate, import or turn into
code is checked first, as is how much of it there is (see ``fasp_fx/storage/_untrusted.py``). Operators run as
they are named, so load only what you would also run.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from ...base._device import check_device
from ...base._undisturbed import in_usual_modes, one_at_a_time
from ...errors import ArgumentError
from .._result import Result
from ..submodules._load import is_parts, load_parts
from ._load import load_program


def save(result: Result, path: str | Path, *, overwrite: bool = False) -> Path:
    """As :meth:`fasp_fx.Result.save`."""
    return result.save(path, overwrite=overwrite)


@one_at_a_time
@in_usual_modes
def load(
    path: str | Path, *, model: nn.Module | None = None, device: torch.device | str | None = None
) -> Result:
    """Read a result that :func:`save` wrote.

    Args:
        path: the folder.
        model: for a model that was pruned in parts, the dense one, whose code runs between them; its weights
            do not matter, and it is left as it was.
        device: where the model shall be; ``None``: where it was, or where ``model`` is.

    Raises:
        StoreError: a file is missing, damaged, or of another format; names the file and what to do.
        ArgumentError: the path is none, ``model`` is missing or not needed, or there is no such
            device here.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(f"path is a {type(path).__name__}; pass the folder that save() wrote")
    folder = Path(path)
    target = None if device is None else check_device(device, values=False)
    if is_parts(folder):
        return load_parts(folder, model, target)
    if model is not None:
        raise ArgumentError(
            f"'{folder}' is no result that was pruned in parts, so it needs no model; leave model= out"
        )
    return load_program(folder, target)


__all__ = ["load", "save"]
