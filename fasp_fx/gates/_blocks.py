"""The channel sets of a group by its blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..groups import Group


def members_of(group: Group) -> np.ndarray[Any, Any]:
    """The channel sets of each block, shape ``[blocks, width]``."""
    return np.stack([np.flatnonzero(group.block_of == block) for block in np.unique(group.block_of)])


__all__ = ["members_of"]
