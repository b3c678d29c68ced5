"""Recurrent layers: cells in a loop of Python, and whole layers, pruned mask-exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import one_capture
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


class Sequence(nn.Module):
    """A recurrent layer between two linear ones; it ends on every step's output and on the last states."""

    def __init__(self, kind: str, start: str = "none", **options: Any) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(5, HIDDEN, **options)
        self.start, self.batch = start, 0 if self.layer.batch_first else 1
        rows = self.layer.num_layers * (2 if self.layer.bidirectional else 1)
        self.up, self.down = nn.Linear(3, 5), nn.Linear((self.layer.proj_size or HIDDEN) * (2 if self.layer.bidirectional else 1), 2)
        self.first = nn.Linear(3, rows * HIDDEN) if start == "computed" else nn.Parameter(torch.zeros(rows, 1, HIDDEN)) if start == "learned" else None

    def forward(self, x: Tensor) -> Tensor:
        state = self.state(x)
        output, _ = self.layer(self.up(x), (state, state) if state is not None and isinstance(self.layer, nn.LSTM) else state)
        return self.down(output)

    def state(self, x: Tensor) -> Tensor | None:
        if isinstance(self.first, nn.Parameter):
            return self.first.expand(-1, x.shape[self.batch], -1).contiguous()
        if self.first is None:
            return None
        return self.first(x.select(1 - self.batch, 0)).tanh().unflatten(-1, (-1, HIDDEN)).transpose(0, 1).contiguous()


def laid(model: Sequence, batch: int) -> Tensor:
    """Inputs as the layer takes them; the exporter fixes the number of steps."""
    return data(batch).transpose(0, model.batch).contiguous()


LAYERS = {
    "LSTM": ("LSTM", {"batch_first": True}),
    "LSTM of three layers without biases": ("LSTM", {"num_layers": 3, "bias": False}),
    "LSTM both ways": ("LSTM", {"num_layers": 2, "bidirectional": True, "dropout": 0.5}),
    "LSTM with projections": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 4}),
    "LSTM with projections without biases": ("LSTM", {"proj_size": 4, "bias": False, "batch_first": True}),
    "GRU": ("GRU", {}),
    "GRU both ways": ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}),
    "RNN": ("RNN", {"num_layers": 2}),
    "RNN of rectified units, both ways": ("RNN", {"nonlinearity": "relu", "bidirectional": True}),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("kind", "options"), LAYERS.values(), ids=LAYERS)
def test_whole_layers(kind: str, options: dict[str, Any]) -> None:
    model = randomise(Sequence(kind, **options), std=0.6)
    with one_capture():
        most = fasp_fx.analyze(model, (laid(model, 2),)).max_sparsity
        for share in (0.4, 1.0):
            result = fasp_fx.prune(model, (laid(model, 2),), sparsity=share * most, score="random", restore=None)
            for batch in (2, 5):
                held(model, result, laid(model, batch))
    for name, weight in model.layer.named_parameters():
        found = result.module.layer.get_parameter(name)
        if name.startswith("weight_hh"):
            assert found.shape[1] == 1 if "proj" not in str(options) else found.shape[1] < weight.shape[1]


@pytest.mark.parametrize("start", ["computed", "learned"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_initial_states_of_the_graph(kind: str, start: str) -> None:
    model = randomise(Sequence(kind, start, num_layers=2, bidirectional=True), std=0.6)
    result = fasp_fx.prune(model, (laid(model, 2),), sparsity=0.4, score="random", restore=None)
    held(model, result, laid(model, 5))
    assert result.module.layer.weight_hh_l1_reverse.shape[1] < HIDDEN
