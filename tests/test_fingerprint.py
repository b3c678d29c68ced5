"""Models are told apart by every value that they compute with."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import pytest
import torch
from models import wide
from torch import Tensor, nn

import fasp_fx
from fasp_fx.base import _tensors as _fingerprint, fingerprint
from fasp_fx.errors import ArgumentError, StoreError

DATA = [torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
WIDTH = 2048


def by_hand(name: str, tensor: Tensor) -> str:
    """The digest, in whole numbers of Python."""
    keys = hashlib.shake_256(b"fasp_fx").digest(8 * WIDTH)
    keys = [int.from_bytes(keys[8 * at : 8 * at + 8], "little") | 1 for at in range(WIDTH)]
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    for start in range(0, len(content), 4 * WIDTH):
        run = content[start : start + 4 * WIDTH].ljust(4 * WIDTH, b"\0")
        total = 0
        for at, key in enumerate(keys):
            total += key * int.from_bytes(run[4 * at : 4 * at + 4], "little", signed=True)
        digest.update((total % 2**64).to_bytes(8, "little"))
    return digest.hexdigest()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5000),
        torch.randn(70, 33).T,
        torch.randn(3001).bfloat16(),
        torch.randn(2049).double()[1:],
        torch.arange(40000, dtype=torch.uint8)[3:],
        torch.rand(77) > 0.5,
        torch.tensor(3, dtype=torch.int64),
        torch.randn(5, 7, dtype=torch.complex64),
        torch.randn(99)[::2],
        torch.randn(5, 7, dtype=torch.complex64).real[:, 0],
        torch.ones(1).expand(9),
    ],
    ids=[
        "one",
        "transposed",
        "half",
        "shifted",
        "bytes",
        "truth",
        "single",
        "complex",
        "each other",
        "part",
        "spread",
    ],
)
@pytest.mark.parametrize("size", [4 * WIDTH, 2**19])
def test_it_is_the_sum_that_it_is_said_to_be(
    tensor: Tensor, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fingerprint, "_BYTES", size)
    assert fingerprint({"a": tensor}) == by_hand("a", tensor)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_other_layouts_and_quantized_tensors() -> None:
    dense = torch.zeros(6, 6)
    dense[2, 3] = 1.0
    moved = dense.T
    assert fingerprint({"a": dense.to_sparse()}) != fingerprint({"a": moved.to_sparse()})
    made = [torch.quantize_per_tensor(one, 0.1, 0, torch.qint8) for one in (dense, moved)]
    assert fingerprint({"a": made[0]}) != fingerprint({"a": made[1]})


def normed() -> nn.Module:
    """With statistics, and a table that is as long as the longest call so far, and not saved."""
    model = wide(
        lambda m, x: m.down(torch.relu(m.norm(m.up(x)))) + m.table[: x.shape[0], None],
        size=8,
        norm=nn.BatchNorm1d(24),
    )
    model.register_buffer("table", torch.arange(16.0), persistent=False)
    return model


def with_other_statistics(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other.norm.running_mean.add_(torch.linspace(-1, 1, 24))
    return other


def test_a_checkpoint_and_costs_are_of_the_buffers_too(tmp_path: Path) -> None:
    model = normed()
    other = with_other_statistics(model)
    options = {"calibration": DATA, "sparsity": 0.3, "quality": "fast", "allocation": "global"}
    fasp_fx.prune(model, (DATA[0],), checkpoint=tmp_path / "run", **options)
    with pytest.raises(StoreError, match="model differ"):
        fasp_fx.prune(other, (DATA[0],), checkpoint=tmp_path / "run", **options)
    costs = fasp_fx.measure(model, (DATA[0],), calibration=DATA, quality="fast")
    with pytest.raises(ArgumentError, match="cost curves are of another model"):
        fasp_fx.prune(other, (DATA[0],), costs=costs, **options)
    fasp_fx.prune(model, (DATA[0],), costs=costs, **options)


def test_a_teacher_has_the_buffers_of_the_model_that_was_pruned(tmp_path: Path) -> None:
    model = normed()
    other = with_other_statistics(model)
    result = fasp_fx.prune(model, (DATA[0],), calibration=DATA, sparsity=0.3, quality="fast")
    loaded = fasp_fx.load(result.save(tmp_path / "saved"))
    with pytest.raises(ArgumentError, match=r"buffer 'norm\.running_mean' holds other values"):
        fasp_fx.distil(loaded, other, DATA, epochs=1)
    # Counters that no forward reads are nobody's business.
    model.norm.num_batches_tracked += 1
    model.table = torch.arange(64.0)
    fasp_fx.distil(result, model, DATA, epochs=1)
