"""State that a model keeps between calls: nothing that the library does counts as a call, and results start
where the caller's model stands.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from refusal import BATCH, Vectors, X
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx

pytestmark = [
    pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning"),
    pytest.mark.usefixtures("no_files"),
]


class Statistics(Vectors):
    """Running statistics of the hidden layer, written by an operator whose schema does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(24))
        self.register_buffer("var", torch.ones(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(
            torch.relu(F.batch_norm(self.up(x), self.mean, self.var, training=True, momentum=0.2))
        )


class Instances(nn.Module):
    """The same, by an instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(6, 24, 3, padding=1), nn.Conv1d(24, 6, 3)
        self.register_buffer("mean", torch.zeros(24))
        self.register_buffer("var", torch.ones(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(
            torch.relu(F.instance_norm(self.up(x), self.mean, self.var, use_input_stats=True, momentum=0.2))
        )


class Renormed(nn.Module):
    """A lookup scales the looked up rows of its parameter down."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(10, 6, max_norm=0.5), Vectors()

    def forward(self, ids: Tensor) -> Tensor:
        return self.block(self.embed(ids))


class Counts(Vectors):
    """A buffer that counts calls, and changes what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.full((), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x * self.calls)


class Plain(Vectors):
    """A tensor that is neither buffer nor parameter, and one in a dict; no exporter takes their being
    written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.log = torch.zeros(1), {"calls": torch.zeros(1)}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log["calls"].add_(1)
        return super().forward(x) if x.sum() < 1e9 else x


@contextlib.contextmanager
def _bit_identical(model: nn.Module) -> Iterator[None]:
    def state() -> dict[str, Tensor]:
        own = {
            f"{path}.{name}": value
            for path, module in model.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        }
        logs = {
            f"{path}.log": module.log["calls"]
            for path, module in model.named_modules()
            if isinstance(module, Plain)
        }
        return {**model.state_dict(), **own, **logs}

    before = copy.deepcopy(state())
    yield
    after = state()
    assert [name for name in before if not torch.equal(after[name], before[name])] == []


CASES: dict[str, tuple[type[nn.Module], Tensor, Tensor]] = {
    "batch norm": (Statistics, X, BATCH),
    "instance norm": (Instances, torch.randn(3, 6, 5), torch.randn(7, 6, 9)),
    "embedding": (Renormed, torch.arange(10).reshape(2, 5), torch.arange(8).reshape(4, 2)),
    "count": (Counts, X, BATCH),
}


@pytest.mark.parametrize("name", CASES)
def test_the_callers_model_stays_and_results_start_from_it(name: str) -> None:
    kind, example, batch = CASES[name]
    torch.manual_seed(0)
    model = kind().eval()
    with _bit_identical(model):
        fasp_fx.analyze(model, (example,))
        result = fasp_fx.prune(model, (example,), calibration=[batch, batch], restore=None, sparsity=0.3)
        replayed = fasp_fx.apply(model, result.plan, (example,))
    kept = {
        name: value
        for name, value in result.module.state_dict().items()
        if value.shape == model.state_dict()[name].shape
    }
    assert kept
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in kept.items())
    for x in (example, batch, example):  # both evolve alike from there
        assert torch.equal(result.module(x), replayed.module(x))


@pytest.mark.parametrize("name", CASES)
def test_an_error_during_calibration_leaves_no_trace(name: str) -> None:
    class Interrupted(Exception):
        pass

    def stop(fraction: float) -> None:
        if fraction == 1.0:
            raise Interrupted

    kind, example, batch = CASES[name]
    model = kind().eval()
    with _bit_identical(model), pytest.raises(Interrupted):
        fasp_fx.prune(model, (example,), calibration=[batch], sparsity=0.3, progress=stop)


@pytest.mark.parametrize(
    "call", [fasp_fx.analyze, lambda model, args: fasp_fx.prune(model, args, calibration=[BATCH])]
)
def test_plain_tensors_are_put_back_where_the_capture_fails(call: Any) -> None:
    model = Plain().eval()
    with _bit_identical(model), pytest.raises(fasp_fx.CaptureError):
        call(model, (X,))


class ManySequences(Vectors):
    """Refuses the first thing that a capture tries, and counts its calls in an attribute."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if len(x) != 1:
            raise ValueError("one at a time")
        return super().forward(x) * self.calls


def test_every_attempt_to_capture_finds_the_model_as_it_was() -> None:
    model = ManySequences().eval()
    with pytest.warns(fasp_fx.CaptureWarning, match="in the second of two calls .*'calls'"):
        result = fasp_fx.prune(model, (X[:1],), score="magnitude", restore=None, sparsity=0.001)
    assert model.calls == 0
    assert "forward sets the attribute 'calls', which a graph does not" in result.report.notes
    torch.testing.assert_close(result.module(X[:1]), Vectors.forward(model, X[:1]))


class Listed(nn.Module):
    """Reads a weight by its name, and once more from a list that no module knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)
        self.listed = [self.last.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.down(self.up(x).relu())) + x @ self.listed[0]


def test_a_weight_that_is_also_read_from_a_list(tmp_path_factory: pytest.TempPathFactory) -> None:
    model, x, folder = Listed().eval(), torch.randn(2, 8), tmp_path_factory.mktemp("saved")
    result = fasp_fx.prune(model, (x,), score="magnitude", restore=None, sparsity={"down.weight": 0.5})
    gone = list(result.plan.groups[0].consumers[0].removed)
    with torch.no_grad():
        model.down.weight[:, gone] = 0
        assert torch.allclose(result.module(x), model(x), atol=1e-6)
        for changed in (result.module.get_parameter("last.weight"), model.last.weight):
            changed.mul_(2)  # both readings go on being one weight
        assert torch.allclose(result.module(x), model(x), atol=1e-6)
        assert torch.allclose(fasp_fx.load(result.save(folder / "out")).module(x), model(x), atol=1e-6)
