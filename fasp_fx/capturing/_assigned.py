"""Assignments to a slice (``x[:, 1:] += y``), written as what they are to channels: a concatenation of what
stays and what is new; and to a mask, a choice.

Functionalised the former are ``slice_scatter`` and ``select_scatter`` of a ``copy``. Nothing can go along the
dimension of a scatter, which has no gradient for complex tensors, and a copy has none at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.compat import OpOverload

_ATEN = torch.ops.aten


def _slice_scatter(
    self: Tensor, src: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Any:
    """``NotImplemented``, which leaves the operator as it is, where the pieces are not known
    while capturing.
    """
    start, end = 0 if start is None else start, sys.maxsize if end is None else end
    fixed = all(type(bound) is int for bound in (start, end, step))
    if (
        not fixed
        or step != 1
        or src.dtype != self.dtype
        or (isinstance(src.shape[dim], int) and src.shape[dim] == 0)
    ):
        return NotImplemented
    before = [] if start == 0 else [_ATEN.slice.Tensor(self, dim, 0, start)]
    after = [] if end == sys.maxsize else [_ATEN.slice.Tensor(self, dim, end, sys.maxsize)]
    pieces = [
        piece
        for piece in (*before, src, *after)
        if not (isinstance(piece.shape[dim], int) and piece.shape[dim] == 0)
    ]
    return _ATEN.cat.default(pieces, dim) if len(pieces) > 1 else _ATEN.clone.default(src)


def _select_scatter(self: Tensor, src: Tensor, dim: int, index: Any) -> Any:
    if type(index) is not int:
        return NotImplemented
    rank = self.dim()
    return _slice_scatter(
        self, _ATEN.unsqueeze.default(src, dim % rank), dim % rank, index, None if index == -1 else index + 1
    )


def _index_put(self: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """One value wherever a mask is true (``x[x > 1] = 1``)."""
    mask = indices[0] if len(indices) == 1 else None
    one = all(isinstance(size, int) and size == 1 for size in values.shape)
    if mask is None or mask.dtype != torch.bool or not one or accumulate:
        return NotImplemented
    for _ in range(self.dim() - mask.dim()):
        mask = _ATEN.unsqueeze.default(mask, -1)
    return _ATEN.where.self(mask, _ATEN.view.default(values, []), self)


def _copy(self: Tensor, src: Tensor, non_blocking: bool = False) -> Any:
    if src.device != self.device:
        return NotImplemented
    cast = (
        _ATEN.clone.default(src) if src.dtype == self.dtype else _ATEN._to_copy.default(src, dtype=self.dtype)
    )
    return cast if cast.shape == self.shape else _ATEN.expand.default(cast, list(self.shape))


#: for :meth:`torch.export.ExportedProgram.run_decompositions`
ASSIGNMENTS: dict[OpOverload, Callable[..., Any]] = {
    _ATEN.copy.default: _copy,
    _ATEN.index_put.default: _index_put,
    _ATEN.slice_scatter.default: _slice_scatter,
    _ATEN.select_scatter.default: _select_scatter,
}
