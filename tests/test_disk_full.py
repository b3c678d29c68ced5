"""A full disk is told by a typed error, spoils nothing, and the same call goes on once there is room."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import fasp_fx
from fasp_fx.errors import StoreError

DATA = [torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Inside, no file can be longer."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="module")
def captured() -> fasp_fx.Captured:
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
    return fasp_fx.capture(model.eval(), (DATA[0],))


@pytest.mark.parametrize("size", [100, 3000, 6000])
def test_a_checkpoint_goes_on_after_it(captured: fasp_fx.Captured, size: int, tmp_path: Path) -> None:
    """From the first file, or from the weights of the first stop on, there is no room."""
    folder = tmp_path / "run"

    def prune(checkpoint: Path | None) -> fasp_fx.Result:
        return fasp_fx.prune(captured, calibration=DATA, sparsity=0.3, quality="fast", checkpoint=checkpoint)

    with room_for(size), pytest.raises(StoreError, match="cannot be written"):
        prune(folder)
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    found, expected = prune(folder), prune(None)
    assert found.plan == expected.plan
    for own, other in zip(found.module.parameters(), expected.module.parameters(), strict=True):
        assert torch.equal(own, other)


def test_what_was_left_when_the_process_was_killed_is_no_other_run(
    captured: fasp_fx.Captured, tmp_path: Path
) -> None:
    (tmp_path / ".run.json.0123456789ab.partial").write_text('{"for')
    options = {"calibration": DATA, "sparsity": 0.3, "quality": "fast"}
    fasp_fx.prune(captured, checkpoint=tmp_path, **options)
    assert (tmp_path / "run.json").is_file()


def test_what_a_file_held_stays(captured: fasp_fx.Captured, tmp_path: Path) -> None:
    costs, file = fasp_fx.measure(captured, calibration=DATA), tmp_path / "file"
    costs.save(file)
    before = file.read_text()
    for name in ("file", "other"):
        with room_for(200), pytest.raises(StoreError, match="cannot be written"):
            costs.save(tmp_path / name)
    assert file.read_text() == before
    assert list(tmp_path.iterdir()) == [file]
    costs.save(file)
    assert fasp_fx.allocation.Costs.load(file).to_json() == costs.to_json()
