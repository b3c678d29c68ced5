"""Recurrent layers: cells in a loop of Python, and whole layers, pruned mask-exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import made
from oracle import error, zeroed
from torch import Tensor, nn
from zoo import randomise

import fasp_fx
import fasp_fx.testing

pytestmark = pytest.mark.usefixtures("shared_captures")

HIDDEN = 6


def looped(kind: str, **options: Any) -> nn.Module:
    """A cell called step by step."""

    def forward(self: Any, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], HIDDEN)
        state = (state, state) if kind == "LSTMCell" else state
        for step in range(x.shape[1]):
            state = self.cell(self.up(x[:, step]), state)
        return self.down(state[0] if kind == "LSTMCell" else state)

    cell = getattr(nn, kind)(5, HIDDEN, **options)
    return made(forward, up=nn.Linear(3, 5), down=nn.Linear(HIDDEN, 2), cell=cell)


def data(batch: int, steps: int = 4) -> Tensor:
    return torch.randn(batch, steps, 3, generator=torch.Generator().manual_seed(batch))


def held(model: nn.Module, result: fasp_fx.Result, *inputs: Tensor) -> None:
    """The result equals the dense model in which the consumers' removed columns are zero, and that differs
    from the dense one.
    """
    with torch.no_grad():
        found, expected, dense = result.module(*inputs), zeroed(model, result.plan)(*inputs), model(*inputs)
    assert error(found, expected) < 1e-5
    assert error(expected, dense) > 1e-3


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_what_torch_keeps_for_itself_is_no_remark(kind: type[nn.RNNBase]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.layer.seen = x.shape
        return self.down(self.layer(x)[0])

    model = made(forward, layer=kind(5, HIDDEN, batch_first=True), down=nn.Linear(HIDDEN, 2))
    notes = fasp_fx.analyze(model, (torch.randn(2, 4, 5),)).program.notes
    assert notes == ("forward sets the attribute 'layer.seen', which a graph does not",)


@pytest.mark.parametrize(
    ("kind", "options", "gates"),
    [
        ("LSTMCell", {}, 4),
        ("GRUCell", {"bias": False}, 3),
        ("RNNCell", {"nonlinearity": "relu"}, 1),
    ],
)
def test_cells_in_a_loop(kind: str, options: dict[str, Any], gates: int) -> None:
    model = randomise(looped(kind, **options), std=0.8)
    result = fasp_fx.prune(model, (data(2),), sparsity=0.4, score="random", restore=None)
    held(model, result, data(5))
    (group,) = [
        group
        for group in result.plan.groups
        if any(part.name == "cell.weight_hh" for part in group.consumers)
    ]
    removed = next(part.removed for part in group.consumers if part.name == "cell.weight_hh")
    assert {part.name for part in group.consumers} == {"cell.weight_hh", "down.weight"}
    left = HIDDEN - len(removed)
    assert len(removed) > 0
    # the loop was captured with as many steps as the example has
    with pytest.raises(fasp_fx.CallError, match=r"captured for x.shape\[1\] == 4"):
        result.module(data(2, 5))
    assert result.module.cell.weight_hh.shape == (gates * left, left)
    rows = next(part.removed for part in group.producers if part.name == "cell.weight_ih")
    assert list(rows) == [gate * HIDDEN + channel for gate in range(gates) for channel in removed]


class Sequence(nn.Module):
    """A recurrent layer between two linear ones; it ends on every step's output and on the last states."""

    def __init__(self, kind: str, learned: bool = False, **options: Any) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(5, HIDDEN, **options)
        self.batch = 0 if self.layer.batch_first else 1
        rows = self.layer.num_layers * (2 if self.layer.bidirectional else 1)
        self.up, self.down = (
            nn.Linear(3, 5),
            nn.Linear((self.layer.proj_size or HIDDEN) * (2 if self.layer.bidirectional else 1), 2),
        )
        self.learned = nn.Parameter(torch.zeros(rows, 1, HIDDEN)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        state = None
        if self.learned is not None:
            state = self.learned.expand(-1, x.shape[self.batch], -1).contiguous()
        output, _ = self.layer(
            self.up(x), (state, state) if state is not None and isinstance(self.layer, nn.LSTM) else state
        )
        return self.down(output)


def laid(model: Sequence, batch: int) -> Tensor:
    """Inputs as the layer takes them."""
    return data(batch).transpose(0, model.batch).contiguous()


LAYERS = {
    "LSTM both ways": ("LSTM", {"num_layers": 2, "bidirectional": True, "dropout": 0.5}),
    "LSTM with projections": ("LSTM", {"num_layers": 2, "proj_size": 4}),
    "GRU without biases": ("GRU", {"batch_first": True, "bias": False}),
    "RNN of rectified units, both ways": (
        "RNN",
        {"nonlinearity": "relu", "bidirectional": True, "num_layers": 2, "batch_first": True},
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    ("kind", "options"),
    LAYERS.values(),
    ids=LAYERS,
)
def test_whole_layers(kind: str, options: dict[str, Any]) -> None:
    model = randomise(Sequence(kind, **options), std=0.6)
    most = fasp_fx.analyze(model, (laid(model, 2),)).max_sparsity
    for share in (0.4, 1.0):
        result = fasp_fx.prune(model, (laid(model, 2),), sparsity=share * most, score="random", restore=None)
        for batch in (2, 5):
            held(model, result, laid(model, batch))
    steps = 1 - model.batch
    held(model, result, laid(model, 3).narrow(steps, 0, 2))  # other numbers of steps than the example's
    held(model, result, torch.cat([laid(model, 3)] * 3, steps))


@pytest.mark.parametrize("kind", ["GRU", pytest.param("LSTM", marks=pytest.mark.slow)])
def test_learned_initial_states(kind: str) -> None:
    model = randomise(Sequence(kind, learned=True, num_layers=2, bidirectional=True), std=0.6)
    result = fasp_fx.prune(model, (laid(model, 2),), sparsity=0.4, score="random", restore=None)
    held(model, result, laid(model, 5))
    assert result.module.layer.weight_hh_l1_reverse.shape[1] < HIDDEN


def translates(self: Any, x: Tensor) -> Tensor:
    """An encoder whose last states start a decoder; the answer is read from outputs and last states."""
    output, state = self.decoder(x, self.encoder(x)[1])
    last = state[1] if isinstance(state, tuple) else state
    return self.read(output) + self.sum(torch.cat([last[-1], last[0]], -1))[:, None]


@pytest.mark.parametrize("kind", ["LSTM", pytest.param("GRU", marks=pytest.mark.slow)])
def test_states_handed_on(kind: str) -> None:
    encoder, decoder = (getattr(nn, kind)(3, HIDDEN, num_layers=2, batch_first=True) for _ in range(2))
    layers = {"read": nn.Linear(HIDDEN, 2), "sum": nn.Linear(2 * HIDDEN, 2)}
    model = randomise(made(translates, encoder=encoder, decoder=decoder, **layers), std=0.6)
    result = fasp_fx.prune(model, (data(2),), sparsity=0.4, score="random", restore=None)
    held(model, result, data(5))
    for layer in (0, 1):
        encoder, decoder = (
            module.get_parameter(f"weight_hh_l{layer}").shape[1]
            for module in (result.module.encoder, result.module.decoder)
        )
        assert encoder == decoder < HIDDEN


def test_states_at_the_boundary_stay() -> None:
    def forward(self: Any, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        output, last = self.returned(self.given(x, state)[0])
        return self.down(output), last

    given, returned = (nn.GRU(size, HIDDEN, batch_first=True) for size in (3, HIDDEN))
    model = randomise(made(forward, given=given, returned=returned, down=nn.Linear(HIDDEN, 2)), std=0.6)
    groups = fasp_fx.analyze(model, (data(2), torch.zeros(1, 2, HIDDEN))).groups
    found = {member.name: (group.status, group.reason) for group in groups for member in group.producers}
    assert found["given.weight_hh_l0"] == ("frozen", "reaches the input 'state'")
    assert found["returned.weight_hh_l0"] == ("frozen", "reaches output 1")


def test_recurrent_layers_are_restored() -> None:
    model = randomise(Sequence("LSTM", num_layers=2, bidirectional=True, batch_first=True), std=0.7)
    result = fasp_fx.prune(model, (data(2),), calibration=[data(200)], sparsity=0.35)
    cut = fasp_fx.apply(model, result.plan, (data(2),))
    with torch.no_grad():
        repaired, left = ((one.module(data(200)) - model(data(200))).norm() for one in (result, cut))
    assert repaired < left


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), LAYERS.values(), ids=LAYERS)
def test_every_invariant(kind: str, options: dict[str, Any]) -> None:
    model = randomise(Sequence(kind, **options), std=0.6)
    fasp_fx.testing.check_program(model, (laid(model, 2),))
