"""A calibration that was interrupted goes on after the last consumer that was done, to the same result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deciding import decide
from fasp_fx.config import PruningConfig
from rank import llama, numbers, tokens, twice
from torch import nn

import fasp_fx
import fasp_fx.hf
from fasp_fx.calibration import _visit
from fasp_fx.calibration._visit import Decision
from fasp_fx.errors import ArgumentError, StoreError

pytestmark = pytest.mark.usefixtures("shared_captures")

OPTIONS: dict[str, dict[str, Any]] = {
    "fast": {"quality": "fast"},
    "balanced": {"quality": "balanced"},
    "best, with drift": {"quality": "best"},
    "products": {"quality": "fast", "include": ("exempt",)},
    "no repair": {"quality": "fast", "restore": None},
    "at random": {"quality": "fast", "score": "random"},
}


HOW: dict[str, Any] = {
    "calibration": [{"input_ids": batch} for batch in tokens()],
    "sparsity": 0.3,
    "quality": "fast",
}


class KilledError(Exception):
    """Stands for the end of the process."""


def _killed(work: Callable[[], object], at: int, where: tuple[Any, str], patch: pytest.MonkeyPatch) -> bool:
    """Whether a piece of work came to the call of that number of a function, where it ends."""
    calls, (owner, name) = 0, where
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KilledError
        return original(*args, **kwargs)

    with patch.context() as inside:
        inside.setattr(owner, name, counted)
        try:
            work()
        except KilledError:
            return True
    return False


@pytest.fixture(scope="module")
def captured() -> fasp_fx.Captured:
    return fasp_fx.capture(llama(), (), {"input_ids": tokens()[0], "use_cache": False})


def _decides_alike(found: Decision, expected: Decision) -> bool:
    return (
        np.array_equal(found.gone, expected.gone)
        and found.weights.keys() == expected.weights.keys()
        and all(torch.equal(weight, expected.weights[name]) for name, weight in found.weights.items())
        and found.notes == expected.notes
    )


def _same(found: fasp_fx.Result, expected: fasp_fx.Result) -> bool:
    weights = dict(expected.module.named_parameters())
    same = all(torch.equal(parameter, weights[name]) for name, parameter in found.module.named_parameters())
    return (
        same
        and found.plan == expected.plan
        and found.report.lines == expected.report.lines
        and found.report.notes == expected.report.notes
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_it_goes_on_to_the_same_bits(
    captured: fasp_fx.Captured, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decisions are compared; what is made of equal ones is equal."""
    program, config = captured.program, PruningConfig.of(None, {"sparsity": 0.3, **options})
    calibration = [{"input_ids": batch} for batch in tokens()]
    expected = decide(program, config, calibration)[1]
    where = [(_visit, "_restored"), (_visit.Observer, "_record"), (_visit.Observer, "_advance")]
    ends = 0
    for number, (place, at) in enumerate(zip(where, (1, 3, 2), strict=True)):
        folder = tmp_path / str(number)

        def work(folder: Path = folder) -> Decision:
            return decide(program, config, calibration, checkpoint=folder)[1]

        ends += _killed(work, at, place, monkeypatch)
        assert _decides_alike(work(), expected)
    assert _decides_alike(work(), expected), "all of it known"
    assert ends >= 2


def test_what_is_known_is_not_observed_again(
    captured: fasp_fx.Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {**HOW, "checkpoint": tmp_path / "state"}
    fasp_fx.prune(captured, **how)

    def no_more(*args: object) -> None:
        raise AssertionError("observed again")

    monkeypatch.setattr(_visit.Observer, "_observe", no_more)
    monkeypatch.setattr(_visit, "_restored", no_more)
    fasp_fx.prune(captured, **how)


def test_uses_that_lie_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer that is seen twice is written down when both were."""
    captured = fasp_fx.capture(twice(), (numbers()[0],))
    how = {"calibration": numbers(), "sparsity": 0.3, "quality": "fast"}
    expected = fasp_fx.prune(captured, **how)
    for at in (1, 2, 3):
        folder = tmp_path / str(at)

        def work(folder: Path = folder) -> fasp_fx.Result:
            return fasp_fx.prune(captured, checkpoint=folder, **how)

        _killed(work, at, (_visit.Observer, "_record"), monkeypatch)
        assert _same(work(), expected)


@pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning")
def test_generating_and_plain_models_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    for plain in (False, True):
        how: dict[str, Any] = {"calibration": tokens(), "sparsity": 0.2, "quality": "fast", "plain": plain}
        expected = fasp_fx.hf.prune(model, **how)
        folder = tmp_path / str(plain)

        def work(folder: Path = folder, how: dict[str, Any] = how) -> fasp_fx.hf.Pruned:
            return fasp_fx.hf.prune(model, checkpoint=folder, **how)

        assert _killed(work, 2, (_visit, "_restored"), monkeypatch)
        found = work()
        assert found.plan == expected.plan
        assert all(
            torch.equal(found.model.get_parameter(name), parameter)
            for name, parameter in expected.model.named_parameters()
        )


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"calibration": [{"input_ids": batch} for batch in tokens(3)]}, "data differ"),
    "options": ({"sparsity": 0.4}, "options, what goes of each group differ"),
}


@pytest.mark.parametrize(("other", "said"), OTHERS.values(), ids=list(OTHERS))
def test_another_run_is_refused(
    captured: fasp_fx.Captured, tmp_path: Path, other: dict[str, Any], said: str
) -> None:
    fasp_fx.prune(captured, checkpoint=tmp_path / "state", **HOW)
    with pytest.raises(StoreError, match=said):
        fasp_fx.prune(captured, checkpoint=tmp_path / "state", **{**HOW, **other})


def test_another_model_and_what_is_no_checkpoint(captured: fasp_fx.Captured, tmp_path: Path) -> None:
    fasp_fx.prune(captured, checkpoint=tmp_path / "state", **HOW)
    model = llama()
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(StoreError, match="model differ"):
        fasp_fx.prune(
            fasp_fx.capture(model, (), {"input_ids": tokens()[0], "use_cache": False}),
            checkpoint=tmp_path / "state",
            **HOW,
        )
    model = llama()
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU().eval()  # the same weights, and another code
    with pytest.raises(StoreError, match="model differ"):
        fasp_fx.prune(
            fasp_fx.capture(model, (), {"input_ids": tokens()[0], "use_cache": False}),
            checkpoint=tmp_path / "state",
            **HOW,
        )
    fasp_fx.prune(
        fasp_fx.capture(llama(), (), {"input_ids": tokens()[0], "use_cache": False}),
        checkpoint=tmp_path / "state",
        **HOW,
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="no checkpoint"):
        fasp_fx.prune(captured, checkpoint=tmp_path / "mine", **HOW)
    own: dict[str, Any] = {"score": lambda columns: columns.norms, "checkpoint": tmp_path / "own", **HOW}
    with pytest.raises(ArgumentError, match=r"code of your own.* key="):
        fasp_fx.prune(captured, **own)
    expected = fasp_fx.prune(captured, key="norms", **own)
    assert _same(fasp_fx.prune(captured, key="norms", **own), expected)
    with pytest.raises(StoreError, match="options differ"):
        fasp_fx.prune(captured, key="squares", **own)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a stop is missing": lambda folder: shutil.rmtree(folder / "stop-1"),
    "no weights": lambda folder: (folder / "stop-1" / "weights.safetensors").unlink(),
    "cut weights": lambda folder: (folder / "stop-1" / "weights.safetensors").write_bytes(b"{"),
    "no JSON": lambda folder: (folder / "stop-2" / "events.json").write_text("{"),
    "no list of what went": (
        lambda folder: (folder / "stop-2" / "events.json").write_text(json.dumps({"after": 1}))
    ),
    "another run": lambda folder: (folder / "run.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_checkpoint_is_refused(
    captured: fasp_fx.Captured, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    fasp_fx.prune(captured, checkpoint=tmp_path / "state", **HOW)
    damage(tmp_path / "state")
    with pytest.raises(StoreError, match="remove"):
        fasp_fx.prune(captured, checkpoint=tmp_path / "state", **HOW)


def test_a_model_in_parts_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.inner(x) if x.sum().item() > 0 else self.inner(-x)
            return found

    x = torch.randn(4, 8)
    model, state = Odd().eval(), tmp_path / "state"
    how: dict[str, Any] = {"calibration": [x], "sparsity": 0.3}
    expected = fasp_fx.prune(model, (x,), **how)
    made = fasp_fx.prune(model, (x,), checkpoint=state, **how)
    monkeypatch.setattr(_visit.Observer, "_observe", None)  # nothing is seen a second time
    again = fasp_fx.prune(model, (x,), checkpoint=state, **how)
    assert made.plan == again.plan == expected.plan
    for found in (made, again):
        assert torch.equal(found.module(x), expected.module(x))
