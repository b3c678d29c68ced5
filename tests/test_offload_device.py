"""Weights in files and batches on an accelerator, for which another device stands (:mod:`elsewhere`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from elsewhere_runs import CASES

import fasp_fx


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process prints that knows the device."""
    script = Path(__file__).with_name("elsewhere_runs.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path_factory.mktemp("scratch")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return said


@pytest.mark.parametrize("name", CASES)
def test_batches_on_a_device_decide_and_repair_as_on_the_cpu(found: dict[str, Any], name: str) -> None:
    seen = found["runs"][name]
    assert seen["plan"]
    assert seen["differing"] == []
    assert seen["devices"] == ["cpu"]
    assert seen["nodes"] > 3, "they ran there"
    assert seen["repaired"] > 0


def test_what_a_device_does_not_serve_is_refused(found: dict[str, Any]) -> None:
    said = found["refusals"]
    assert said["costs"].startswith("ArgumentError: gradients are taken where the weights are")
    assert said["memory"].startswith("OffloadError: 'elsewhere:0' has too little memory")
    assert "tried to allocate 3.00 GiB; it takes some 0.00 GiB" in said["memory"]


def test_batches_that_do_not_fit_the_device_are_divided(found: dict[str, Any]) -> None:
    seen = found["divided"]
    assert seen["refused"] == 1
    assert seen["plan"]
    assert seen["differing"] == []
    assert seen["notes"] == ["memory was too short for the calibration batches, which were divided into 2"]


def test_a_device_that_is_none(tmp_path: Path) -> None:
    with (
        pytest.raises(fasp_fx.errors.ArgumentError, match="'moon' cannot be used"),
        fasp_fx.offload(tmp_path / "new", device="moon"),
    ):
        pass
    assert not (tmp_path / "new").exists()
