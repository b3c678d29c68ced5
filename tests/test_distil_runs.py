"""Distillation that is interrupted: what it leaves, how it goes on, and which folders it goes on from."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import wide
from test_disk_full import room_for
from test_distil import (
    Made,
    Squared,
    assert_weights,
    batches,
    net,
    pruned,
    relative_error,
    told,
    weights_of,
)
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx
from fasp_fx.errors import ArgumentError, CalibrationError, StoreError, TrainingMemoryError


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

    def raises(error: Exception) -> Any:
        def forward(*args: Any, **kwargs: Any) -> None:
            raise error

        return forward

    broken = copy.deepcopy(result)
    monkeypatch.setattr(broken.module, "forward", raises(torch.OutOfMemoryError("tried to get 4 GiB")))
    with pytest.raises(TrainingMemoryError, match="tried to get 4 GiB; give smaller batches"):
        fasp_fx.distil(broken, dense, data)
    monkeypatch.setattr(broken.module, "forward", raises(ValueError("no such shape")))
    with pytest.raises(CalibrationError, match="the pruned model does not take batch 5: ValueError: no such"):
        fasp_fx.distil(broken, dense, data)
