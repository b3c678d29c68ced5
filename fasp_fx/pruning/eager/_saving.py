"""Folders of transformers hold sizes in a configuration: what it cannot say is not saved there."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

from ...base._tolerable import tolerable
from ...base._warn import quiet
from ...capturing._transformers import is_transformers
from ...errors import EagerError


def keep_from_saving(module: nn.Module) -> None:
    """Have ``save_pretrained`` of a copy refuse, where a model that is built of its configuration has other
    sizes: nobody could load what it wrote.
    """
    if is_transformers(module) and not _says_sizes(module):
        module.save_pretrained = functools.partial(_refuse, type(module).__name__)  # type: ignore[assignment]


def _says_sizes(module: Any) -> bool:
    try:
        with quiet(), torch.device("meta"):
            built = type(module)(copy.deepcopy(module.config))
    except tolerable(Exception):  # a class refuses what it likes
        return False
    return _shapes(built) == _shapes(module)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters(remove_duplicate=False)}


def _refuse(name: str, *args: Any, **kwargs: Any) -> None:
    raise EagerError(
        f"the configuration of {name} does not say the sizes that its layers have now, and nobody could load"
        " the folder; save state_dict(), or prune with fasp_fx.hf.prune(..., plain=True), whose result is an"
        " ordinary checkpoint"
    )


__all__ = ["keep_from_saving"]
