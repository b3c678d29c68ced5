"""The folder of a plain checkpoint: whole or not at all, with what belongs to it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from fasp_fx.report import Line
from saved import GOLDEN

import fasp_fx
from fasp_fx import PruningPlan, Report
from fasp_fx.hf._folder import read_plain, save
from fasp_fx.storage._folder import is_save

PLAN = PruningPlan("0" * 64, (), 0.25)
LINE = Line("a.weight", "prunable", 8, 6, 1, "")
REPORT = Report(0.25, 0.25, (100, 80), (400, 320), (LINE,), notes=("the config says it with ffn_dim 8 -> 6",))


@pytest.fixture(scope="module")
def model() -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(GOLDEN / "plain")


class Tokenizer:
    """Writes one file."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "vocab.txt").write_text("a b c", encoding="utf-8")


def test_the_folder_holds_all_of_it(model: Any, tmp_path: Path) -> None:
    folder = save(model, Tokenizer(), PLAN, REPORT, tmp_path / "out")
    theirs = {"config.json", "generation_config.json", "model.safetensors", "vocab.txt"}
    ours = {"plan.json", "report.json", "manifest.json"}
    assert {file.name for file in folder.iterdir()} == theirs | ours
    assert read_plain(folder) == (PLAN, REPORT)
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    assert is_save(folder, "plain")
    again = hf.AutoModelForCausalLM.from_pretrained(folder)
    for own, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(own, other)


def test_what_was_trained_since_is_saved_anew(model: Any, tmp_path: Path) -> None:
    """What lies beside a manifest that says otherwise may be damaged, so it is not taken for trained."""
    folder = Path(shutil.copytree(GOLDEN / "plain", tmp_path / "out"))
    found = fasp_fx.load(folder)
    with torch.no_grad():
        found.model.lm_head.weight.fill_(0.5)
    found.model.save_pretrained(folder)
    with pytest.raises(fasp_fx.StoreError, match=r"config.json has|model.safetensors was changed"):
        fasp_fx.load(folder)
    again = fasp_fx.load(found.save_pretrained(tmp_path / "again")).model
    assert (again.lm_head.weight == 0.5).all()
    (folder / "manifest.json").unlink()  # then it is a folder of transformers
    assert (hf.AutoModelForCausalLM.from_pretrained(folder).lm_head.weight == 0.5).all()
