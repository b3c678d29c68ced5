"""Reading what was saved: only the house as a whole knows the saves of all of its rooms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fasp_fx.base import check_device, in_usual_modes, one_at_a_time, path_of
from fasp_fx.errors import StoreError
from fasp_fx.pruning import SAVES, Result, read_result
from fasp_fx.storage import read_manifest

if TYPE_CHECKING:
    from fasp_fx.hf import Pruned


@one_at_a_time
@in_usual_modes
def load(
    path: str | Path, *, model: nn.Module | None = None, device: torch.device | str | None = None
) -> Result | Pruned:
    """Read what was saved, whichever kind of folder it is.

    Args:
        path: the folder.
        model: for a model that was pruned in parts, the dense one, whose code runs between them; its weights
            do not matter, and it is left as it was; unused for others.
        device: where the model shall be; ``None``: where it was, or where ``model`` is.

    Returns:
        A :class:`fasp_fx.Result`; of a folder of :mod:`fasp_fx.hf`, of any format, a
        :class:`fasp_fx.hf.Pruned`.

    Raises:
        StoreError: a file is missing, damaged, or of another format; names the file and what to do.
        ArgumentError: the path is none, ``model`` is missing, or there is no such
            device here.

    Examples:
        >>> folder = result.save("smaller")
        >>> loaded = fasp_fx.load("smaller")
        >>> isinstance(loaded, fasp_fx.Result) and torch.equal(loaded.module(x), result.module(x))
        True
    """
    folder = path_of(path, "path")
    target = None if device is None else check_device(device, values=False)
    kind = read_manifest(folder).kind
    if kind in SAVES:
        return read_result(folder, model, target)
    from fasp_fx.hf import KIND, PLAIN, read_pruned  # takes transformers along

    if kind in (KIND, PLAIN):
        return read_pruned(folder, target)
    raise StoreError(f"'{folder}' holds a save of the kind {kind!r:.80}, which is not known; save again")
