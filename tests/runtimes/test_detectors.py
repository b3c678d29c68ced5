"""The detectors of ultralytics and torchvision, and the examples that train them. scripts/test-runtimes has
what they need; ultralytics is for tests alone.
"""

import copy
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import randomise
from oracle import assert_exact, error
from torch import nn

import fasp_fx
from fasp_fx.allocation import Macs

INSTALL = "is missing; scripts/test-runtimes installs it"
EXAMPLES = Path(__file__).parents[2] / "examples"
HALF: dict[str, Any] = {"budget": Macs(0.5), "round_to": 8, "score": "magnitude", "restore": None}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ["yolo11n", "yolov8n", "yolov10n"])
def test_an_unmodified_model_is_exact_for_any_number_of_images(name: str) -> None:
    tasks = pytest.importorskip("ultralytics.nn.tasks", reason=f"ultralytics {INSTALL}")
    torch.manual_seed(0)
    model = randomise(tasks.DetectionModel(f"{name}.yaml", verbose=False), std=0.05)
    result = fasp_fx.prune(model, (torch.rand(2, 3, 64, 96),), **HALF)
    for number in (1, 3, 8):
        assert_exact(model, result, torch.rand(number, 3, 64, 96))


def ran(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    """What an example leaves behind."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *options])
    return runpy.run_path(str(EXAMPLES / name))


def test_a_smaller_one_trains_within_ultralytics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ultralytics", reason=f"ultralytics {INSTALL}")
    names = ran("yolo.py", tmp_path, monkeypatch, "--epochs", "2", "--size", "64")
    assert error(names["there"], names["here"]) < 1e-4
    dense, small, loaded = names["dense"], names["small"], names["tuned"].model
    assert type(loaded) is type(small) is type(dense)
    sizes = [sum(map(torch.Tensor.numel, one.parameters())) for one in (dense, small, loaded)]
    assert sizes[0] > 1.5 * sizes[1] == 1.5 * sizes[2]
    fused = copy.deepcopy(loaded.float().eval()).fuse(verbose=False)
    images = torch.rand(3, 3, 96, 64)
    with torch.no_grad():
        assert error(fused(images)[0], loaded(images)[0]) < 1e-4


def test_a_detector_of_torchvision_is_pruned_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision", reason=f"torchvision {INSTALL}")
    names = ran("detector.py", tmp_path, monkeypatch, "--steps", "2")
    assert set(names["result"].parts) == {"backbone", "rpn.head", "roi_heads.box_head"}
    assert isinstance(names["again"], nn.Module)
