"""The folder of a plain checkpoint: whole or not at all, with what belongs to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from fasp_fx.report import Line
from zoo import randomise

import fasp_fx
from fasp_fx import PruningPlan, Report
from fasp_fx.hf._plain_folder import is_plain, save_plain

pytestmark = pytest.mark.usefixtures("shared_captures")

PLAN = PruningPlan("0" * 64, (), 0.25)
REPORT = Report(
    0.25,
    0.25,
    (100, 80),
    (400, 320),
    (Line("a.weight", "prunable", 8, 6, 1, ""),),
    notes=("the config says it with ffn_dim 8 -> 6",),
)


@pytest.fixture(scope="module")
def model() -> Any:
    config = hf.OPTConfig(
        hidden_size=8,
        ffn_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=16,
        max_position_embeddings=8,
        word_embed_proj_dim=8,
    )
    return randomise(hf.OPTForCausalLM(config))


class Tokenizer:
    """Writes one file, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def save_pretrained(self, folder: str) -> None:
        if self.error is not None:
            raise self.error
        (Path(folder) / "vocab.txt").write_text("a b c", encoding="utf-8")


def test_the_folder_holds_all_of_it(model: Any, tmp_path: Path) -> None:
    folder = save_plain(model, Tokenizer(), PLAN, REPORT, tmp_path / "out")
    names = {file.name for file in folder.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "vocab.txt",
        "plan.json",
        "README.md",
        "fasp_fx.json",
    }
    assert PruningPlan.from_json((folder / "plan.json").read_text(encoding="utf-8")) == PLAN
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert 'AutoModelForCausalLM.from_pretrained("this/folder")' in card
    assert "ffn_dim 8 -> 6" in card
    assert "| `a.weight` | 8 | 6 |" in card
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    assert is_plain(folder)
    again = hf.AutoModelForCausalLM.from_pretrained(folder)
    assert all(
        torch.equal(own, other) for own, other in zip(model.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "error", [OSError("no space left"), ValueError("no vocabulary")], ids=["disk", "tokenizer"]
)
def test_nothing_half_written_is_left(error: Exception, model: Any, tmp_path: Path) -> None:
    with pytest.raises(fasp_fx.StoreError, match=str(error)):
        save_plain(model, Tokenizer(error), PLAN, REPORT, tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_plain_checkpoint_is_replaced(model: Any, tmp_path: Path) -> None:
    folder = save_plain(model, None, PLAN, REPORT, tmp_path / "out")
    with pytest.raises(fasp_fx.StoreError, match="exists"):
        save_plain(model, None, PLAN, REPORT, folder)
    save_plain(model, Tokenizer(), PLAN, REPORT, folder, overwrite=True)
    assert (folder / "vocab.txt").is_file()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(fasp_fx.StoreError, match="not a folder that save"):
        save_plain(model, None, PLAN, REPORT, folder, overwrite=True)
    assert (folder / "notes.txt").is_file()
    assert (folder / "vocab.txt").is_file()
