"""Recurrent layers over any number of steps.

What an exporter needs to know of a recurrent operator are the shapes of its results. Torch finds them by running a decomposition step by step, which fixes the
number of steps; here they are read off the shapes of the operands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C import DispatchKey

_ATEN = torch.ops.aten
_KEYS = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd, DispatchKey.Meta)


def _lstm(input: Tensor, hx: list[Tensor], params: list[Tensor], has_biases: bool, num_layers: int, dropout: float, train: bool, *options: bool) -> Any:
    return (_steps(input, hx[0], options[0]), torch.empty_like(hx[0]), torch.empty_like(hx[1]))


def _one_state(input: Tensor, hx: Tensor, params: list[Tensor], has_biases: bool, num_layers: int, dropout: float, train: bool, *options: bool) -> Any:
    return (_steps(input, hx, options[0]), torch.empty_like(hx))


def _steps(input: Tensor, state: Tensor, bidirectional: bool) -> Tensor:
    """An output for each step, ``[steps, sequences, width]`` or ``[sequences, steps, width]`` as the input is."""
    return input.new_empty([*input.shape[:2], state.shape[-1] * (2 if bidirectional else 1)])


_KERNELS = {_ATEN.lstm.input: _lstm, _ATEN.gru.input: _one_state, _ATEN.rnn_tanh.input: _one_state, _ATEN.rnn_relu.input: _one_state}


@contextlib.contextmanager
def any_number_of_steps() -> Iterator[None]:
    """Recurrent operators that are traced inside do not fix the number of steps."""
    with contextlib.ExitStack() as stack:
        for operator, kernel in _KERNELS.items():
            stack.callback(operator._dispatch_cache.clear)
            stack.enter_context(mock.patch.dict(operator.py_kernels, dict.fromkeys(_KEYS, kernel)))
            operator._dispatch_cache.clear()
        yield


__all__ = ["any_number_of_steps"]
