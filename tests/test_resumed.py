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
from models import made
from rank import llama, tokens
from refusal import Vectors
from torch import nn

import fasp_fx
import fasp_fx.hf
from fasp_fx.calibration import Decision, Ledger, _repair, _visit
from fasp_fx.errors import ArgumentError, StoreError
from fasp_fx.pruning import PruningConfig

pytestmark = pytest.mark.usefixtures("shared_captures")

OPTIONS: dict[str, dict[str, Any]] = {
    "best, with drift": {"quality": "best"},
    "products": {"quality": "fast", "include": ("exempt",)},
    "unrepaired": {"quality": "fast", "restore": None},
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


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_it_goes_on_to_the_same_bits(
    captured: fasp_fx.Captured, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decisions are compared; what is made of equal ones is equal."""
    program, config = captured.program, PruningConfig.of(None, {"sparsity": 0.3, **options})
    calibration = [{"input_ids": batch} for batch in tokens()]
    expected = decide(program, config, calibration)[1]
    where = [(_repair, "restored"), (Ledger, "commit"), (_visit.Visit, "observe")]
    ends = 0
    for number, (place, at) in enumerate(zip(where, (1, 3, 2), strict=True)):
        folder = tmp_path / str(number)

        def work(folder: Path = folder) -> Decision:
            return decide(program, config, calibration, checkpoint=folder)[1]

        ends += _killed(work, at, place, monkeypatch)
        assert _decides_alike(work(), expected)
    assert _decides_alike(work(), expected), "all of it known"
    assert ends >= 2


def _doubled() -> nn.Module:
    model = llama()
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    return model


def _of_other_code() -> nn.Module:
    """The same weights."""
    model = llama()
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU().eval()
    return model


def _score(key: str | None) -> Any:
    score: Any = lambda columns: columns.norms  # noqa: E731
    score.key = key
    return score


#: another run than the first: its model, its options and what is said
OTHERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "data": (llama, {"calibration": [{"input_ids": batch} for batch in tokens(3)]}, "data differ"),
    "options": (llama, {"sparsity": 0.4}, "options, what goes of each group differ"),
    "weights": (_doubled, {}, "model differ"),
    "code": (_of_other_code, {}, "model differ"),
    "another key": (llama, {"score": _score("squares")}, "options differ"),
}


def test_another_run_is_refused(captured: fasp_fx.Captured, tmp_path: Path) -> None:
    how = {**HOW, "score": _score(None), "checkpoint": tmp_path / "state"}
    with pytest.raises(ArgumentError, match=r"code of your own.* attribute key"):
        fasp_fx.prune(captured, **how)
    how["score"] = _score("norms")
    expected = fasp_fx.prune(captured, **how)
    for make, options, said in OTHERS.values():
        other = fasp_fx.capture(make(), (), {"input_ids": tokens()[0], "use_cache": False})
        with pytest.raises(StoreError, match=said):
            fasp_fx.prune(other, **{**how, **options})
    equal = fasp_fx.capture(llama(), (), {"input_ids": tokens()[0], "use_cache": False})
    assert fasp_fx.prune(equal, **how).plan == expected.plan


def test_what_is_no_checkpoint_is_left_alone(captured: fasp_fx.Captured, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="no checkpoint"):
        fasp_fx.prune(captured, checkpoint=tmp_path, **HOW)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


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


def test_a_damaged_checkpoint_is_refused(captured: fasp_fx.Captured, tmp_path: Path) -> None:
    fasp_fx.prune(captured, checkpoint=tmp_path / "state", **HOW)
    for name, damage in DAMAGE.items():
        folder = Path(shutil.copytree(tmp_path / "state", tmp_path / name))
        damage(folder)
        with pytest.raises(StoreError, match="remove"):
            fasp_fx.prune(captured, checkpoint=folder, **HOW)


def test_a_model_in_parts_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(lambda self, x: self.inner(x if x.sum().item() > 0 else -x), inner=Vectors(8))
    x, state = torch.randn(4, 8), tmp_path / "state"
    how: dict[str, Any] = {"calibration": [x], "sparsity": 0.3}
    expected = fasp_fx.prune(model, (x,), **how)
    first = fasp_fx.prune(model, (x,), checkpoint=state, **how)
    monkeypatch.setattr(_visit.Visit, "observe", None)  # nothing is seen a second time
    again = fasp_fx.prune(model, (x,), checkpoint=state, **how)
    assert first.plan == again.plan == expected.plan
    for found in (first, again):
        assert torch.equal(found.module(x), expected.module(x))
