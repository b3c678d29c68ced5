"""A calibration that was interrupted goes on after the last consumer that was done, to the same result."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from checks import alike, decide
from models import Vectors, made as model_of, wide
from rank import llama, tokens
from test_distil import Made, Squared, assert_weights, batches, net, pruned, relative_error, told, weights_of
from test_shortage import room_for
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx
import fasp_fx.hf
from fasp_fx.calibration import Decision, Ledger, _repair, _visit
from fasp_fx.errors import ArgumentError, CalibrationError, StoreError, TrainingMemoryError
from fasp_fx.pruning import PruningConfig

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
        assert alike(work(), expected)
    assert alike(work(), expected), "all of it known"
    assert ends >= 2


def _doubled() -> nn.Module:
    model = llama()
    next(model.parameters()).detach().mul_(2)
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
        example = {"input_ids": tokens()[0], "use_cache": False}
        other = captured if make is llama else fasp_fx.capture(make(), (), example)
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
    model = model_of(lambda self, x: self.inner(x if x.sum().item() > 0 else -x), inner=Vectors(8))
    x, state = torch.randn(4, 8), tmp_path / "state"
    how: dict[str, Any] = {"calibration": [x], "sparsity": 0.3}
    expected = fasp_fx.prune(model, (x,), **how)
    first = fasp_fx.prune(model, (x,), checkpoint=state, **how)
    monkeypatch.setattr(_visit.Visit, "observe", None)  # nothing is seen a second time
    again = fasp_fx.prune(model, (x,), checkpoint=state, **how)
    assert first.plan == again.plan == expected.plan
    for found in (first, again):
        assert torch.equal(found.module(x), expected.module(x))


# --- distillation that is interrupted


@pytest.fixture(scope="module")
def made() -> Made:
    dense, data = net(), batches()
    return dense, data, pruned(dense, data)


class Stop(Exception):
    """Raised by the test's progress."""


def interrupted(
    result: fasp_fx.Result, dense: nn.Module, data: list[Tensor], at: float, **options: Any
) -> None:
    """Distil until a fraction is done."""

    def stop(fraction: float) -> None:
        if fraction > at:
            raise Stop

    with pytest.raises(Stop):
        fasp_fx.distil(result, dense, data, progress=stop, **options)


@pytest.mark.parametrize("at", [0.0, 0.9])
def test_interrupted_it_goes_on_to_the_same_end(made: Made, at: float, tmp_path: Path) -> None:
    dense, data, result = made
    options: dict[str, Any] = {"learning_rate": 3e-3, "epochs": 3, "evaluations": 6}
    whole = fasp_fx.distil(copy.deepcopy(result), dense, data, **options)
    broken = copy.deepcopy(result)
    before = weights_of(broken)
    interrupted(broken, dense, data, at, checkpoint=tmp_path / "run", **options)
    assert_weights(broken, before)
    resumed = fasp_fx.distil(broken, dense, data, checkpoint=tmp_path / "run", **options)
    assert told(resumed).curve == told(whole).curve
    assert_weights(resumed, weights_of(whole))


def test_interrupted_without_a_checkpoint_it_leaves_the_best_so_far(
    made: Made,
) -> None:
    dense, data, _ = made
    result = pruned(dense, data, restore=None)  # which leaves something to learn
    broken = copy.deepcopy(result)
    interrupted(broken, dense, data, 0.9, learning_rate=3e-3, epochs=5, evaluations=6)
    held_out = data[5:6]
    assert relative_error(broken.module, dense, held_out) < relative_error(result.module, dense, held_out)


def test_what_a_model_draws_does_not_depend_on_the_caller_or_an_interruption(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = wide(lambda self, x: self.down(F.dropout(torch.relu(self.up(x)), 0.2, training=True)))
    data = batches()
    result = pruned(dense, data, restore=None)
    options: dict[str, Any] = {"learning_rate": 3e-3, "epochs": 4, "precision": "weights"}
    found = []
    for seed in (5, 6):
        run = copy.deepcopy(result)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        if seed == 6:
            options["checkpoint"] = tmp_path / "run"
            interrupted(run, dense, data, 0.7, **options)
        found.append(fasp_fx.distil(run, dense, data, **options))
        assert torch.equal(torch.get_rng_state(), state)
    assert_weights(found[1], weights_of(found[0]))
    assert told(found[0]).curve == told(found[1]).curve
    # Nothing is learned, so that evaluations differ by what is drawn alone.
    still = fasp_fx.distil(copy.deepcopy(result), dense, data, learning_rate=1e-12, precision="weights")
    held_out = [point.held_out for point in told(still).curve]
    assert max(held_out) == pytest.approx(min(held_out), rel=1e-4)


def test_outputs_of_the_dense_model_that_are_not_whole_are_refused_before_any_step(
    made: Made, tmp_path: Path
) -> None:
    dense, data, result = made
    run = copy.deepcopy(result)
    interrupted(run, dense, data, 0.7, checkpoint=tmp_path / "run", epochs=3)
    file = tmp_path / "run" / "dense" / "3.pt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"3\.pt' is damaged.*remove it"):
        fasp_fx.distil(run, dense, data, checkpoint=tmp_path / "run", epochs=3)
    file.unlink()
    fasp_fx.distil(run, dense, data, checkpoint=tmp_path / "run", epochs=3)


@pytest.mark.parametrize(("most", "rows"), [(1500, 200), (3000, 16)], ids=["dense outputs", "state"])
def test_a_full_disk_is_said_and_the_weights_are_as_before(
    made: Made, most: int, rows: int, tmp_path: Path
) -> None:
    dense, data, result = made
    data = [x.repeat(rows // 16, 1) for x in data]
    run = copy.deepcopy(result)
    with room_for(most), pytest.raises(StoreError, match=r"cannot be written.*free space"):
        fasp_fx.distil(run, dense, data, checkpoint=tmp_path / "run", epochs=1)
    assert_weights(run, weights_of(result))
    assert not list((tmp_path / "run").glob("**/*.partial"))
    assert len(list((tmp_path / "run").glob("dense/*"))) == (0 if rows > 16 else len(data))
    fasp_fx.distil(run, dense, data, checkpoint=tmp_path / "run", epochs=1)


def test_checkpoints_of_other_runs_and_other_folders_are_refused(made: Made, tmp_path: Path) -> None:
    dense, data, result = made
    run = tmp_path / "run"
    fasp_fx.distil(copy.deepcopy(result), dense, data, checkpoint=run, epochs=1)
    frozen = copy.deepcopy(result)
    frozen.module.get_parameter("0.weight").requires_grad_(False)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").write_text("mine")
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / "state.pt").write_bytes((run / "state.pt").read_bytes()[:1000])
    for said, found, given, folder, epochs in (
        ("options differ", result, data, run, 2),
        ("data differ", result, batches(seed=2), run, 1),
        ("pruned differ", pruned(dense, data, sparsity=0.3), data, run, 1),
        ("trained parameters differ", frozen, data, run, 1),
        ("no checkpoint", result, data, tmp_path / "else", 1),
        ("damaged.*remove it", result, data, damaged, 1),
    ):
        with pytest.raises(StoreError, match=said):
            fasp_fx.distil(copy.deepcopy(found), dense, given, checkpoint=folder, epochs=epochs)


def test_losses_of_ones_own_are_told_apart_by_their_keys(made: Made, tmp_path: Path) -> None:
    dense, data, result = made
    loss: Any = Squared()
    options: dict[str, Any] = {"checkpoint": tmp_path / "run", "epochs": 1, "loss": loss}
    with pytest.raises(ArgumentError, match=r"code of your own.* attribute key"):
        fasp_fx.distil(result, dense, data, **options)
    assert not (tmp_path / "run").exists()
    loss.key = "squares"
    for _ in range(2):
        fasp_fx.distil(copy.deepcopy(result), dense, data, **options)
    loss.key = "cubes"
    with pytest.raises(StoreError, match="options differ"):
        fasp_fx.distil(copy.deepcopy(result), dense, data, **options)


def test_a_device_that_runs_out_and_a_batch_that_the_pruned_model_does_not_take(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, data, result = made
    broken, short = copy.deepcopy(result), torch.OutOfMemoryError("tried to get 4 GiB")
    for error, kind, said in (
        (short, TrainingMemoryError, "tried to get 4 GiB; give smaller batches"),
        (ValueError("no"), CalibrationError, "the pruned model does not take batch 5: ValueError: no"),
    ):
        monkeypatch.setattr(broken.module, "forward", Mock(side_effect=error))
        with pytest.raises(kind, match=said):
            fasp_fx.distil(broken, dense, data)
