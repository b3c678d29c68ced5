"""What operators make, found by the shapes of what they are given alone.

Torch finds the shapes of many operators by running what they are made of. Where sizes vary, each step costs
milliseconds of symbolic arithmetic, several times as much as the rest of a trace; and of a recurrent operator
it fixes the number of steps.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fasp_fx.base import (
    OpOverload,
    decomposed_matmul,
    decomposition_table,
    settle,
    traced_by,
)

from ._sizes import same_sizes

_ATEN = torch.ops.aten


def _fit(sizes: Sequence[int | torch.SymInt], wanted: Sequence[int | torch.SymInt]) -> None:
    """Settle that sizes are those that a weight has.

    Raises:
        RuntimeError: they are not.
    """
    said = f"sizes {[*sizes]} meet a weight for {[*wanted]}"
    settle(len(sizes) == len(wanted), lambda: said)
    for one, other in zip(sizes, wanted, strict=True):
        settle(one == other, lambda: said)  # of data, it is asserted when the program runs


def _recurrent(input: Tensor, hx: Any, params: list[Tensor], *settings: Any) -> Any:
    """An output for each step, ``[steps, sequences, width]`` or ``[sequences, steps, width]`` as the input
    is, and states as those given.

    Args:
        settings: has_biases, num_layers, dropout, train, bidirectional, batch_first.
    """
    states, bidirectional = hx if isinstance(hx, (list, tuple)) else [hx], settings[4]
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    return input.new_empty([*input.shape[:2], width]), *map(torch.empty_like, states)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _fit(input.shape[-1:], weight.shape[-1:])
    return input.new_empty([*input.shape[:-1], *weight.shape[:-1]])


def _matmul(self: Tensor, other: Tensor) -> Any:
    if self.dim() != other.dim() or self.dim() < 3 or not same_sizes(self.shape[:-2], other.shape[:-2]):
        return decomposed_matmul(self, other)
    _fit(self.shape[-1:], other.shape[-2:-1])
    return self.new_empty([*self.shape[:-1], other.shape[-1]])


def _layer_norm(input: Tensor, normalized_shape: Sequence[int], *_: Any, **__: Any) -> Tensor:
    _fit(input.shape[-len(normalized_shape) :], normalized_shape)
    return input.new_empty(input.shape)


def _batch_norm(input: Tensor, weight: Any, bias: Any, mean: Tensor | None, *_: Any) -> Tensor:
    _fit(input.shape[1:2], input.shape[1:2] if mean is None else mean.shape)
    return torch.empty_like(input)


def _grid_sampler(input: Tensor, grid: Tensor, *_: Any) -> Tensor:
    _fit(input.shape[:1], grid.shape[:1])
    return input.new_empty([*input.shape[:2], *grid.shape[1:3]])


def _softmax(self: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return self.new_empty(self.shape, dtype=dtype)


def _pointwise(operator: OpOverload, self: Tensor, *others: Any, **options: Any) -> Any:
    """A function of one real number for each."""
    if self.is_floating_point():
        return torch.empty_like(self)
    return decomposition_table[operator](self, *others, **options)


#: operators of recurrent layers
RECURRENT: dict[OpOverload, Callable[..., Any]] = dict.fromkeys(
    (_ATEN.lstm.input, _ATEN.gru.input, _ATEN.rnn_tanh.input, _ATEN.rnn_relu.input), _recurrent
)
_KERNELS: dict[OpOverload, Callable[..., Any]] = {
    **RECURRENT,
    _ATEN.linear.default: _linear,
    _ATEN.matmul.default: _matmul,
    _ATEN.layer_norm.default: _layer_norm,
    _ATEN.batch_norm.default: _batch_norm,
    _ATEN.dropout.default: lambda input, p, train: torch.empty_like(input),
    _ATEN.softmax.int: _softmax,
}
_POINTWISE = (
    *(_ATEN.cos.default, _ATEN.elu.default, _ATEN.exp.default, _ATEN.gelu.default, _ATEN.hardsigmoid.default),
    *(_ATEN.hardswish.default, _ATEN.hardtanh.default, _ATEN.leaky_relu.default, _ATEN.mish.default),
    *(_ATEN.pow.Tensor_Scalar, _ATEN.relu.default, _ATEN.rsqrt.default, _ATEN.sigmoid.default),
    *(_ATEN.silu.default, _ATEN.sin.default, _ATEN.tanh.default),
)
_IN_PLACE = (
    *(_ATEN.elu_.default, _ATEN.hardsigmoid_.default, _ATEN.hardswish_.default, _ATEN.hardtanh_.default),
    *(_ATEN.leaky_relu_.default, _ATEN.mish_.default, _ATEN.silu_.default),
)
#: of operators that are made of no others, which exporters would record in their place
_FAKES: dict[OpOverload, Callable[..., Any]] = {
    **{operator: functools.partial(_pointwise, operator) for operator in _POINTWISE},
    **dict.fromkeys(_IN_PLACE, lambda self, *_, **__: self),
    _ATEN._safe_softmax.default: _softmax,
    _ATEN.grid_sampler_2d.default: _grid_sampler,
}


@contextlib.contextmanager
def by_shapes() -> Iterator[None]:
    """What is traced inside takes a fraction of the time, and recurrent operators do not fix the number of
    steps.

    As an exporter has it, no library of kernels is asked what it takes: a convolution is recorded without
    guards on the sizes for which one of them is worth while.
    """
    with (
        traced_by(_KERNELS, _FAKES),
        torch.backends.mkldnn.flags(enabled=False, deterministic=None, allow_tf32=None, fp32_precision=None),
        torch.backends.nnpack.flags(enabled=False),
        torch.backends.cudnn.flags(enabled=False),
    ):
        yield
