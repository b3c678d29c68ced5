"""Recurrent layers: cells in a loop of Python, and whole layers, pruned mask-exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import error, zeroed
from torch import Tensor, nn
from zoo import randomise

import fasp_fx

HIDDEN = 6


class Looped(nn.Module):
    """A cell called step by step; its state is zero at first, or made of the first step."""

    def __init__(self, kind: str, given: bool, **options: Any) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 5), nn.Linear(HIDDEN, 2)
        self.start = nn.Linear(3, HIDDEN) if given else None
        self.cell = getattr(nn, kind)(5, HIDDEN, **options)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], HIDDEN) if self.start is None else self.start(x[:, 0]).tanh()
        long = isinstance(self.cell, nn.LSTMCell)
        state = (state, state) if long else state
        for step in range(x.shape[1]):
            state = self.cell(self.up(x[:, step]), state)
        return self.down(state[0] if long else state)


def data(batch: int, steps: int = 4) -> Tensor:
    return torch.randn(batch, steps, 3, generator=torch.Generator().manual_seed(batch))


def held(model: nn.Module, result: fasp_fx.Result, *inputs: Tensor) -> None:
    """The result equals the dense model in which the consumers' removed columns are zero, and that differs from the dense one."""
    with torch.no_grad():
        found, expected, dense = result.module(*inputs), zeroed(model, result.plan)(*inputs), model(*inputs)
    assert error(found, expected) < 1e-5
    assert error(expected, dense) > 1e-3


@pytest.mark.parametrize("given", [False, True], ids=["zero state", "state of the first step"])
@pytest.mark.parametrize(
    ("kind", "options", "gates"),
    [("LSTMCell", {}, 4), ("GRUCell", {"bias": False}, 3), ("RNNCell", {"nonlinearity": "relu"}, 1)],
    ids=["LSTM", "GRU", "RNN"],
)
def test_cells_in_a_loop(kind: str, options: dict[str, Any], gates: int, given: bool) -> None:
    model = randomise(Looped(kind, given, **options), std=0.8)
    result = fasp_fx.prune(model, (data(2),), sparsity=0.4, score="random", restore=None)
    held(model, result, data(5))
    (group,) = [group for group in result.plan.groups if any(part.name == "cell.weight_hh" for part in group.consumers)]
    removed = next(part.removed for part in group.consumers if part.name == "cell.weight_hh")
    assert {part.name for part in group.consumers} == {"cell.weight_hh", "down.weight"}
    left = HIDDEN - len(removed)
    assert len(removed) > 0
    assert result.module.cell.weight_hh.shape == (gates * left, left)
    rows = next(part.removed for part in group.producers if part.name == "cell.weight_ih")
    assert list(rows) == [gate * HIDDEN + channel for gate in range(gates) for channel in removed]


def test_a_cell_is_restored() -> None:
    model = randomise(Looped("GRUCell", False), std=0.8)
    result = fasp_fx.prune(model, (data(2),), calibration=[data(64)], sparsity=0.4)
    cut = fasp_fx.apply(model, result.plan, (data(2),))
    with torch.no_grad():
        dense = model(data(64))
        assert (result.module(data(64)) - dense).norm() < (cut.module(data(64)) - dense).norm()
