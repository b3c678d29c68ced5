"""The box of kept positions of a tensor: its new sizes and offsets once channels are gone."""

from __future__ import annotations

import numpy as np
import torch

from fasp_fx.analysis import Value
from fasp_fx.errors import VerificationError


class Kept:
    """Answers how large each dimension becomes; one instance per removal.

    Args:
        gone: for every channel number, whether it is removed.
    """

    def __init__(self, gone: np.ndarray) -> None:
        self.gone = torch.from_numpy(np.append(gone, False))  # the last entry serves NONE (-1): never removed

    def _mask(self, value: Value, dim: int) -> torch.Tensor | None:
        """Which positions stay, laid out with ``dim`` last; ``None`` if all do."""
        mask = None
        for axis in value.at(dim):
            keep = ~self.gone[axis.numbers]
            mask = keep if mask is None else mask & keep
        return (
            None if mask is None or bool(mask.all()) else mask.movedim(dim, -1).reshape(-1, mask.shape[dim])
        )

    def touches(self, value: Value) -> bool:
        """Whether the tensor loses any position."""
        return any(self._mask(value, axis.dim) is not None for axis in value.axes)

    def before(self, value: Value, dim: int, position: int) -> int:
        """How many positions stay among the first ``position`` along ``dim``; the same in every row, or the
        layout is broken.
        """
        mask = self._mask(value, dim)
        if mask is None:
            return position
        return _in_each_row(mask[:, :position], "channels", value, dim)

    def size(self, value: Value, dim: int) -> int:
        """The new size of ``dim``."""
        return self.before(value, dim, value.shape[dim])

    def factors(self, value: Value, dim: int, count: int, first: bool) -> int:
        """How many of the ``count`` parts of a dimension keep any position; ``first``: parts are runs of
        neighbours, else every ``count``-th.
        """
        mask = self._mask(value, dim)
        if mask is None:
            return count
        parts = (
            mask.reshape(mask.shape[0], count, -1)
            if first
            else mask.reshape(mask.shape[0], -1, count).transpose(1, 2)
        )
        return _in_each_row(parts.any(-1), "groups", value, dim)


def _in_each_row(stay: torch.Tensor, what: str, value: Value, dim: int) -> int:
    """How many stay, the same number in each row."""
    counts = stay.sum(-1)
    if bool((counts != counts[0]).any()):
        raise VerificationError(
            f"unequal numbers of {what} would stay in the rows of a tensor of shape {value.shape} along"
            f" dimension {dim}"
        )
    return int(counts[0])
