"""Recurrent layers over any number of steps.

What an exporter needs to know of a recurrent operator are the shapes of its results. Torch finds them by
running a decomposition step by step, which fixes the number of steps; here they are read off the shapes of
the operands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.compat import OpOverload, traced_by

_ATEN = torch.ops.aten


def _lstm(
    input: Tensor,
    hx: list[Tensor],
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    *options: bool,
) -> Any:
    return (_steps(input, hx[0], options[0]), torch.empty_like(hx[0]), torch.empty_like(hx[1]))


def _one_state(
    input: Tensor,
    hx: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    *options: bool,
) -> Any:
    return (_steps(input, hx, options[0]), torch.empty_like(hx))


def _steps(input: Tensor, state: Tensor, bidirectional: bool) -> Tensor:
    """An output for each step, ``[steps, sequences, width]`` or ``[sequences, steps, width]`` as the input
    is.
    """
    return input.new_empty([*input.shape[:2], state.shape[-1] * (2 if bidirectional else 1)])


_KERNELS: dict[OpOverload, Callable[..., Any]] = {
    _ATEN.lstm.input: _lstm,
    _ATEN.gru.input: _one_state,
    _ATEN.rnn_tanh.input: _one_state,
    _ATEN.rnn_relu.input: _one_state,
}


def any_number_of_steps() -> contextlib.AbstractContextManager[None]:
    """Recurrent operators that are traced inside do not fix the number of steps."""
    return traced_by(_KERNELS)


__all__ = ["any_number_of_steps"]
