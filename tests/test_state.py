"""State that a model keeps between calls, and parameters that it reads by another way than their attribute:
nothing that the library does counts as a call, results start where the caller's model stands, and what is one
parameter stays one.
"""

import contextlib
import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models import BATCH, Vectors, X, block, linear, made, randomise, wide
from oracle import zeroed
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
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

    model: Any = randomise(
        made(
            forward,
            **linear(up=(5, 12), middle=(12, 12), down=(12, 2), last=(2, 2)),
            shift=torch.arange(2.0),
            scale=torch.linspace(0.5, 1.5, 12),
        ).double()
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


# --- where a public function is called


DATA = [torch.randn(30, 8, generator=torch.Generator().manual_seed(index)) for index in range(4)]
OPTIONS: dict[str, Any] = {"calibration": DATA, "sparsity": 0.3}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def same(found: fasp_fx.Result, expected: fasp_fx.Result) -> bool:
    pairs = zip(found.module.parameters(), expected.module.parameters(), strict=True)
    return found.plan == expected.plan and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("mode", "quality"),
    [
        (torch.inference_mode, "balanced"),
        (torch.no_grad, "fast"),
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "balanced"),
    ],
)
def test_modes_of_the_caller_change_nothing(
    mode: Callable[[], contextlib.AbstractContextManager[Any]], quality: Any
) -> None:
    expected, model = fasp_fx.prune(net(), (DATA[0],), quality=quality, **OPTIONS), net()
    with mode():
        found = fasp_fx.prune(model, (DATA[0],), quality=quality, **OPTIONS)
    assert same(found, expected)
    found.module(DATA[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in found.module.parameters())


def test_what_is_loaded_or_distilled_in_inference_mode_can_be_trained(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    result, dense = fasp_fx.prune(net(), (DATA[0],), **OPTIONS), net()
    folder = result.save(tmp_path_factory.mktemp("saved") / "small")
    with torch.inference_mode():
        loaded = fasp_fx.load(folder)
        fasp_fx.distil(result, dense, [x.clone() for x in DATA], epochs=1)
    for found in (loaded, result):
        found.module(DATA[0]).sum().backward()


def test_data_that_an_encoder_made_leads_no_gradient_back() -> None:
    encoder = nn.Linear(8, 8)
    made = [encoder(x) for x in DATA]
    expected = fasp_fx.prune(net(), (DATA[0],), calibration=[x.detach() for x in made], sparsity=0.3)
    found = fasp_fx.prune(net(), (DATA[0],), calibration=made, sparsity=0.3)
    assert same(found, expected)
    fasp_fx.distil(found, net(), made, epochs=2)
    assert encoder.weight.grad is None


def test_threads_take_turns() -> None:
    expected = fasp_fx.prune(net(), (DATA[0],), **OPTIONS)
    # Made here: drawing weights in one thread while another seeds torch would give others.
    models = [net() for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda model: fasp_fx.prune(model, (DATA[0],), **OPTIONS), models):
            assert same(found, expected)
    counter = CompileCounter()
    torch.compile(net(), backend=counter)(DATA[0])
    assert counter.frame_count, "torch.compile was left switched off"


def test_who_has_the_turn_may_call_the_library_again() -> None:
    """From a callback, say, whose own pruning changes nothing of the one that called it."""
    expected, found = fasp_fx.prune(net(), (DATA[0],), **OPTIONS), list[fasp_fx.Result]()

    def again(fraction: float) -> None:
        if 0.0 < fraction < 1.0 and not found:
            found.append(fasp_fx.prune(net(), (DATA[0],), **OPTIONS))

    assert same(fasp_fx.prune(net(), (DATA[0],), progress=again, **OPTIONS), expected)
    assert same(found[0], expected)


def test_garbage_is_collected_as_before_once_a_model_is_captured() -> None:
    seen: list[bool] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        seen.append(gc.isenabled())
        raise RuntimeError("no")

    with pytest.raises(fasp_fx.FaspError):
        fasp_fx.analyze(made(forward, layer=nn.Linear(4, 4)), (torch.randn(2, 4),))
    assert not seen[0]
    assert gc.isenabled()


def test_weights_made_in_inference_mode_are_refused_with_the_remedy() -> None:
    with torch.inference_mode():
        model = net()
    with pytest.raises(
        fasp_fx.ArgumentError, match=r"'0\.weight' was made in torch's inference mode .*deepcopy"
    ):
        fasp_fx.prune(model, (DATA[0],), **OPTIONS)
    assert fasp_fx.prune(copy.deepcopy(model), (DATA[0],), **OPTIONS).report.sparsity > 0.2


def test_captures_are_copied() -> None:
    captured = fasp_fx.capture(net(), (DATA[0],))
    expected = fasp_fx.prune(captured, **OPTIONS)
    for copied in (copy.copy(captured), copy.deepcopy(captured)):
        assert same(fasp_fx.prune(copied, **OPTIONS), expected)
    apart = copy.deepcopy(captured)
    next(iter(captured.program.weights().values())).detach().zero_()
    assert same(fasp_fx.prune(apart, **OPTIONS), expected)
    with pytest.raises(fasp_fx.ArgumentError, match="has changed since the model was captured"):
        copy.deepcopy(captured)
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(captured)


def test_weights_that_are_put_in_the_place_of_those_captured_are_noticed() -> None:
    model = net()
    captured = fasp_fx.capture(model, (DATA[0],))
    model.load_state_dict(net().state_dict(), assign=True)
    with pytest.raises(fasp_fx.ArgumentError, match=r"'0\.weight' has changed since .*; capture it again"):
        fasp_fx.prune(captured, **OPTIONS)


def test_costs_that_would_not_be_used_are_refused() -> None:
    costs = fasp_fx.Costs.from_json(fasp_fx.measure(net(), (DATA[0],), calibration=DATA).to_json())
    with pytest.raises(fasp_fx.ArgumentError, match=r"score='obs'.* this pruning is by score='magnitude'"):
        fasp_fx.prune(net(), (DATA[0],), costs=costs, score="magnitude", allocation="global", **OPTIONS)
    with pytest.raises(fasp_fx.ArgumentError, match="costs= is for an allocation by predicted losses"):
        fasp_fx.prune(net(), (DATA[0],), costs=costs, score="obs", allocation="uniform", **OPTIONS)


def test_what_asks_for_nothing_says_so() -> None:
    result = fasp_fx.prune(net(), (DATA[0],), calibration=DATA, sparsity=1e-9)
    assert not result.plan.groups
    assert any("nothing goes" in note for note in result.report.notes)
