"""Weights that a checkpoint holds and the model that was loaded of it does not want."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import ArgumentError

_NUMBER = re.compile(r"\.\d+\.")


def refuse_left_out(model: nn.Module, info: Mapping[str, Any], where: str) -> None:
    """Refuse a model that has fewer layers than its files: by the names of the others' weights, its
    configuration says too small a number.

    Other weights may be left out: a model of one kind can be loaded of a checkpoint that holds more.

    Args:
        info: what transformers says of the loading.

    Raises:
        ArgumentError: names a weight that would be left out.
    """
    known = {_NUMBER.sub(".", name) for name, _ in model.named_parameters(remove_duplicate=False)}
    beyond = sorted(
        name
        for name in map(str, info.get("unexpected_keys") or ())
        if _NUMBER.search(name) and _NUMBER.sub(".", name) in known
    )
    if beyond:
        raise ArgumentError(
            f"'{where}' holds weights of more layers than its configuration says ({beyond[0]}), which would"
            " be left out; correct the configuration"
        )


__all__ = ["refuse_left_out"]
