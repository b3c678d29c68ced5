"""What training takes is known before it begins, and refused where it is not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fasp_fx.recovery import _memory
from torch import Tensor, nn

import fasp_fx
from fasp_fx.errors import TrainingMemoryError
from fasp_fx.training.recovery._memory import kept_bytes

#: rows, and the widths of two layers; of float32
ROWS, IN, WIDE, OUT = 32, 16, 64, 4


def made() -> tuple[nn.Module, fasp_fx.Result, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, WIDE), nn.ReLU(), nn.Linear(WIDE, OUT)).eval()
    data = [torch.randn(ROWS, IN) for _ in range(4)]
    return model, fasp_fx.prune(model, (data[0],), calibration=data, sparsity=0.5), data


def test_kept_is_what_autograd_keeps() -> None:
    """By hand: the inputs of both layers, of which the second is what ReLU keeps as well."""
    model = nn.Sequential(nn.Linear(IN, WIDE), nn.ReLU(), nn.Linear(WIDE, OUT))
    found = kept_bytes(lambda: model(torch.randn(ROWS, IN)), model)
    assert found == 4 * ROWS * (IN + WIDE)


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_what_is_freed_on_the_way_is_not_taken_for_another(rows: int) -> None:
    """Each layer's result may lie where that of an earlier one was, which is no longer there."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64, bias=False), nn.Sigmoid()) for _ in range(9)))
    found = kept_bytes(lambda: model(torch.randn(rows, 64)), model)
    assert found == 4 * rows * 64 * 10, "the input, and what each sigmoid gives"


def free(monkeypatch: pytest.MonkeyPatch, found: int | None) -> None:
    monkeypatch.setattr(_memory, "free_bytes", lambda device: found)


def needed(result: fasp_fx.Result) -> tuple[int, int]:
    """Four numbers for each that is trained, and what autograd keeps, of a result as above."""
    stay = result.module.get_parameter("0.weight").shape[0]
    return 4 * 4 * sum(p.numel() for p in result.module.parameters()), 4 * ROWS * (IN + stay)


def test_refused_with_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, result, data = made()
    own, kept = needed(result)
    before = {name: tensor.clone() for name, tensor in result.module.state_dict().items()}
    free(monkeypatch, own + kept - 1)
    with pytest.raises(TrainingMemoryError, match=r"batches of at most 99 % of that size, or train=") as said:
        fasp_fx.distil(result, model, data)
    assert "train='vectors' with these batches" in str(said.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in result.module.state_dict().items())
    fasp_fx.distil(result, model, [batch[: ROWS * 99 // 100] for batch in data], epochs=1)
    fasp_fx.distil(result, model, data, train="vectors", epochs=1)
    free(monkeypatch, own + kept)
    fasp_fx.distil(result, model, data, epochs=1)


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, result, data = made()
    free(monkeypatch, 0)
    with pytest.raises(MemoryError, match="what fits: nothing beside these models"):
        fasp_fx.distil(result, model, data, train="vectors")
    free(monkeypatch, None)  # where nobody says how much is free
    fasp_fx.distil(result, model, data, epochs=1)


def test_a_device_that_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, result, data = made()

    def short(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 4 GiB")

    monkeypatch.setattr("fasp_fx.training.recovery._training.Training._step", short)
    with pytest.raises(TrainingMemoryError, match="tried to allocate 4 GiB; give smaller batches"):
        fasp_fx.distil(result, model, data)


def test_a_batch_that_the_pruned_model_does_not_take() -> None:
    model, result, data = made()
    with pytest.raises(fasp_fx.CalibrationError, match="the pruned model does not take batch 0"):
        fasp_fx.distil(result, model, [torch.randn(ROWS, IN + 1), data[0]])
