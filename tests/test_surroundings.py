"""Results do not depend on where a public function is called: in which modes, on whose data, beside which
threads.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import made
from torch import Tensor, nn

import fasp_fx

X = [torch.randn(30, 8, generator=torch.Generator().manual_seed(index)) for index in range(4)]
OPTIONS: dict[str, Any] = {"calibration": X, "sparsity": 0.3}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def same(found: fasp_fx.Result, expected: fasp_fx.Result) -> bool:
    pairs = zip(found.module.parameters(), expected.module.parameters(), strict=True)
    return found.plan == expected.plan and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)]
)
def test_modes_of_the_caller_change_nothing(
    mode: Callable[[], contextlib.AbstractContextManager[Any]],
) -> None:
    for options in (OPTIONS, {**OPTIONS, "quality": "fast"}):
        expected = fasp_fx.prune(net(), (X[0],), **options)
        model = net()
        with mode():
            found = fasp_fx.prune(model, (X[0],), **options)
        assert same(found, expected)
        found.module(X[0]).sum().backward()
        assert all(parameter.grad is not None for parameter in found.module.parameters())


def test_what_is_loaded_or_distilled_in_inference_mode_can_be_trained(tmp_path: Any) -> None:
    result, dense = fasp_fx.prune(net(), (X[0],), **OPTIONS), net()
    result.save(tmp_path / "small")
    with torch.inference_mode():
        loaded = fasp_fx.load(tmp_path / "small")
        fasp_fx.distil(result, dense, [x.clone() for x in X], epochs=1)
    for found in (loaded, result):
        found.module(X[0]).sum().backward()


def test_data_that_an_encoder_made_leads_no_gradient_back() -> None:
    encoder = nn.Linear(8, 8)
    made = [encoder(x) for x in X]
    expected = fasp_fx.prune(net(), (X[0],), calibration=[x.detach() for x in made], sparsity=0.3)
    found = fasp_fx.prune(net(), (X[0],), calibration=made, sparsity=0.3)
    assert same(found, expected)
    fasp_fx.distil(found, net(), made, epochs=2)
    assert encoder.weight.grad is None


def test_threads_take_turns() -> None:
    expected = fasp_fx.prune(net(), (X[0],), **OPTIONS)
    found: list[Any] = []

    def job(model: nn.Module) -> None:
        try:
            found.append(same(fasp_fx.prune(model, (X[0],), **OPTIONS), expected))
        except Exception as error:  # a thread that fails is to be seen below
            found.append(error)

    # Made here: drawing weights in one thread while another seeds torch would give others.
    threads = [threading.Thread(target=job, args=(net(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 2
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    torch.compile(net(), backend=backend)(X[0])
    assert compiled, "torch.compile was left switched off"


def test_who_has_the_turn_may_call_the_library_again() -> None:
    """From a callback, say, whose own pruning changes nothing of the one that called it."""
    expected, found = fasp_fx.prune(net(), (X[0],), **OPTIONS), list[fasp_fx.Result]()

    def again(fraction: float) -> None:
        if 0.0 < fraction < 1.0 and not found:
            found.append(fasp_fx.prune(net(), (X[0],), **OPTIONS))

    assert same(fasp_fx.prune(net(), (X[0],), progress=again, **OPTIONS), expected)
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
        fasp_fx.prune(model, (X[0],), **OPTIONS)
    assert fasp_fx.prune(copy.deepcopy(model), (X[0],), **OPTIONS).report.sparsity > 0.2


def test_captures_are_copied() -> None:
    captured = fasp_fx.capture(net(), (X[0],))
    expected = fasp_fx.prune(captured, **OPTIONS)
    for copied in (copy.copy(captured), copy.deepcopy(captured)):
        assert same(fasp_fx.prune(copied, **OPTIONS), expected)
    apart = copy.deepcopy(captured)
    with torch.no_grad():
        next(iter(captured.program.weights().values())).zero_()
    assert same(fasp_fx.prune(apart, **OPTIONS), expected)
    with pytest.raises(fasp_fx.ArgumentError, match="has changed since the model was captured"):
        copy.deepcopy(captured)
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(captured)


def test_weights_that_are_put_in_the_place_of_those_captured_are_noticed() -> None:
    model = net()
    captured = fasp_fx.capture(model, (X[0],))
    model.load_state_dict(net().state_dict(), assign=True)
    with pytest.raises(fasp_fx.ArgumentError, match=r"'0\.weight' has changed since .*; capture it again"):
        fasp_fx.prune(captured, **OPTIONS)


def test_costs_that_would_not_be_used_are_refused() -> None:
    costs = fasp_fx.Costs.from_json(fasp_fx.measure(net(), (X[0],), calibration=X).to_json())
    with pytest.raises(fasp_fx.ArgumentError, match=r"score='obs'.* this pruning is by score='magnitude'"):
        fasp_fx.prune(net(), (X[0],), costs=costs, score="magnitude", allocation="global", **OPTIONS)
    with pytest.raises(fasp_fx.ArgumentError, match="costs= is for an allocation by predicted losses"):
        fasp_fx.prune(net(), (X[0],), costs=costs, score="obs", allocation="uniform", **OPTIONS)


def test_what_asks_for_nothing_says_so() -> None:
    options = {"calibration": X, "exclude": ("0.weight",)}
    with pytest.raises(
        fasp_fx.ArgumentError, match=r"asks for 0\.5 of '2\.weight', which matches no group .* not excluded"
    ):
        fasp_fx.prune(net(), (X[0],), sparsity={"2.weight": 0.5, "4": 0.5}, **options)  # type: ignore[arg-type]
    with pytest.raises(
        fasp_fx.ArgumentError,
        match=r"asks for 0\.5 of '0\.weight', which matches no group that can be pruned",
    ):
        fasp_fx.prune(net(), (X[0],), calibration=X, sparsity={"2": 0.3, "0.weight": 0.5})
    result = fasp_fx.prune(net(), (X[0],), calibration=X, sparsity=1e-9)
    assert not result.plan.groups
    assert any("nothing goes" in note for note in result.report.notes)
