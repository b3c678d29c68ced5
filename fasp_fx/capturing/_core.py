"""Layers of core ATen (``run_decompositions()``), written as the operators that models call, which have the
rules: both compute the same, by the same kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.compat import OpOverload

_ATEN = torch.ops.aten
_CONVOLUTIONS = {1: _ATEN.conv1d.default, 2: _ATEN.conv2d.default, 3: _ATEN.conv3d.default}
_TRANSPOSED = {
    1: _ATEN.conv_transpose1d.default,
    2: _ATEN.conv_transpose2d.input,
    3: _ATEN.conv_transpose3d.input,
}


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Any:
    rank = weight.dim() - 2
    if rank not in _CONVOLUTIONS:
        return NotImplemented
    if transposed:
        return _TRANSPOSED[rank](input, weight, bias, stride, padding, output_padding, groups, dilation)
    return _CONVOLUTIONS[rank](input, weight, bias, stride, padding, dilation, groups)


def _layer_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    dims = list(range(input.dim() - len(normalized_shape), input.dim()))
    return (
        _ATEN.layer_norm.default(input, normalized_shape, weight, bias, eps),
        *_moments(input, dims, eps),
    )


def _group_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    N: Any,
    C: Any,
    HxW: Any,
    group: int,
    eps: float,
) -> Any:
    mean, scale = _moments(_ATEN.view.default(input, [N, group, -1]), [2], eps)
    return (
        _ATEN.group_norm.default(input, group, weight, bias, eps),
        _ATEN.view.default(mean, [N, group]),
        _ATEN.view.default(scale, [N, group]),
    )


def _moments(input: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor]:
    """What a norm returns for its derivative, which nothing in a forward pass uses."""
    variance = _ATEN.var.correction(input, dims, correction=0, keepdim=True)
    return _ATEN.mean.dim(input, dims, True), _ATEN.rsqrt.default(_ATEN.add.Scalar(variance, eps))


#: for :meth:`torch.export.ExportedProgram.run_decompositions`
CORE: dict[OpOverload, Callable[..., Any]] = {
    _ATEN.convolution.default: _convolution,
    _ATEN.native_layer_norm.default: _layer_norm,
    _ATEN.native_group_norm.default: _group_norm,
}
