"""State that a model keeps between calls, and parameters that it reads by another way than their attribute:
nothing that the library does counts as a call, results start where the caller's model stands, and what is one
parameter stays one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import BATCH, Vectors, X, block, made, randomise, wide
from oracle import zeroed
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx

pytestmark = [
    pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning"),
    pytest.mark.usefixtures("no_files"),
]


def _statistics(norm: Callable[..., Tensor], **held: Any) -> nn.Module:
    """Running statistics of the hidden layer, written by an operator whose schema does not say so."""
    return wide(
        lambda self, x: self.down(torch.relu(norm(self.up(x), self.mean, self.var, momentum=0.2))),
        mean=torch.zeros(24),
        var=torch.ones(24),
        **held,
    )


def _counts(self: Any, x: Tensor) -> Tensor:
    """A buffer counts calls, and changes what they give."""
    self.calls += 1
    return block(self, x * self.calls)


def _plain(self: Any, x: Tensor) -> Tensor:
    """Tensors that are neither buffer nor parameter, one in a dict; no exporter takes their being written."""
    self.log["own"] += 1
    self.log["calls"].add_(1)
    return block(self, x) if x.sum() < 1e9 else x


@contextlib.contextmanager
def _bit_identical(model: nn.Module) -> Iterator[None]:
    def state() -> dict[str, Tensor]:
        return {**model.state_dict(), **getattr(model, "log", {})}

    before = copy.deepcopy(state())
    yield
    assert [name for name, value in state().items() if not torch.equal(before[name], value)] == []


#: models, examples and batches
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]] = {
    "batch norm": (
        lambda: _statistics(lambda *given, **named: F.batch_norm(*given, **named, training=True)),
        X,
        BATCH,
    ),
    "instance norm": (
        lambda: _statistics(
            lambda *given, **named: F.instance_norm(*given, **named, use_input_stats=True),
            up=nn.Conv1d(6, 24, 3, padding=1),
            down=nn.Conv1d(24, 6, 3),
        ),
        torch.randn(3, 6, 5),
        torch.randn(7, 6, 9),
    ),
    # a lookup scales the looked up rows of its parameter down
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(10, 6, max_norm=0.5), Vectors()).eval(),
        torch.arange(10).reshape(2, 5),
        torch.arange(8).reshape(4, 2),
    ),
    "count": (lambda: wide(_counts, calls=torch.full((), 3.0)), X, BATCH),
}


@pytest.mark.parametrize("name", CASES)
def test_the_callers_model_stays_and_results_start_from_it(name: str) -> None:
    class Interrupted(Exception):
        pass

    def stop(fraction: float) -> None:
        if fraction == 1.0:
            raise Interrupted

    make, example, batch = CASES[name]
    torch.manual_seed(0)
    model = make()
    with _bit_identical(model):
        fasp_fx.analyze(model, (example,))
        result = fasp_fx.prune(model, (example,), calibration=[batch, batch], restore=None, sparsity=0.3)
        replayed = fasp_fx.apply(model, result.plan, (example,))
        with pytest.raises(Interrupted):  # an error leaves no trace either
            fasp_fx.prune(model, (example,), calibration=[batch], sparsity=0.3, progress=stop)
    own = model.state_dict()
    kept = {n: value for n, value in result.module.state_dict().items() if value.shape == own[n].shape}
    assert kept
    assert all(torch.equal(value, own[n]) for n, value in kept.items())
    for x in (example, batch, example):  # both evolve alike from there
        assert torch.equal(result.module(x), replayed.module(x))


@pytest.mark.parametrize(
    "call", [fasp_fx.analyze, lambda model, args: fasp_fx.prune(model, args, calibration=[BATCH])]
)
def test_plain_tensors_are_put_back_where_the_capture_fails(call: Any) -> None:
    model = wide(_plain, log={"own": torch.zeros(1), "calls": torch.zeros(1)})
    with _bit_identical(model), pytest.raises(fasp_fx.CaptureError):
        call(model, (X,))


def test_every_attempt_to_capture_finds_the_model_as_it_was() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        """Refuses the first thing that a capture tries, and counts its calls in an attribute."""
        self.calls += 1
        if len(x) != 1:
            raise ValueError("one at a time")
        return block(self, x) * self.calls

    model: Any = wide(forward)
    type(model).calls = 0
    with pytest.warns(fasp_fx.CaptureWarning, match="in the second of two calls .*'calls'"):
        result = fasp_fx.prune(model, (X[:1],), score="magnitude", restore=None, sparsity=0.001)
    assert model.calls == 0
    assert "forward sets the attribute 'calls', which a graph does not" in result.report.notes
    torch.testing.assert_close(result.module(X[:1]), block(model, X[:1]))


# --- parameters by another way


def listed() -> Any:
    """Reads weights from a list, one of them by its name as well, and buffers from a dict."""

    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = F.linear(self.up(x).relu(), self.weights[0], self.middle.bias).tanh() * self.scales["all"]
        return self.last(self.down(hidden) + self.scales["some"][0]) + hidden[:, :2] @ self.weights[1]

    sizes = {"up": (5, 12), "middle": (12, 12), "down": (12, 2), "last": (2, 2)}
    model: Any = randomise(
        made(
            forward,
            **{name: nn.Linear(*size, dtype=torch.float64) for name, size in sizes.items()},
            shift=torch.arange(2.0, dtype=torch.float64),
            scale=torch.linspace(0.5, 1.5, 12, dtype=torch.float64),
        )
    )
    model.weights = [model.middle.weight, model.last.weight]
    model.scales = {"all": model.scale, "some": (model.shift,)}
    return model


ROWS = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("as_program", [False, True], ids=["module", "program"])
def test_a_parameter_is_the_same_by_whichever_way_it_is_read(
    as_program: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, folder = listed(), tmp_path_factory.mktemp("saved")
    given = torch.export.export(model, (ROWS,), strict=False) if as_program else model
    options: Any = {"sparsity": {"down.weight": 0.3, "middle.weight": 0.3}, "score": "magnitude"}
    result = fasp_fx.prune(given, () if as_program else (ROWS,), restore=None, **options)
    if as_program:  # the caller's stays as it is
        assert any(node.name.startswith("c_lifted") for node in given.graph.nodes)
    assert not any("sets the attribute" in note for note in result.report.notes)
    assert {name for name, _ in result.module.named_buffers()} == {"scale", "shift"}
    for module in (result.module, fasp_fx.load(result.save(folder / "out")).module):
        dense: Any = zeroed(model, result.plan)
        torch.testing.assert_close(module(ROWS), dense(ROWS), rtol=1e-9, atol=1e-9)
    dense(ROWS).square().sum().backward()
    result.module(ROWS).square().sum().backward()
    torch.testing.assert_close(result.module.get_parameter("last.weight").grad, dense.last.weight.grad)


def test_a_part_of_a_parameter_that_is_kept_elsewhere_is_refused() -> None:
    model = listed()
    model.weights[1] = model.last.weight[:, :1]
    with pytest.raises(fasp_fx.CaptureError, match=r"a part of 'last\.weight' that it keeps elsewhere"):
        fasp_fx.capture(model, (ROWS,))


def test_what_shares_no_memory_stays_a_constant() -> None:
    model = listed()
    model.weights[0] = model.middle.weight.detach().clone()
    names = {name for name, _ in fasp_fx.capture(model, (ROWS,)).program.module.named_buffers()}
    assert len(names - {"scale", "shift"}) == 1
