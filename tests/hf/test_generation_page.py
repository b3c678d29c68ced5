"""The Python of docs/generation.md runs as printed, in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "generation.md"


@pytest.mark.slow
def test_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for text in re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    ):
        exec(compile(text, str(PAGE), "exec"), names)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(names["again"](input_ids=ids).logits, names["pruned"].model(input_ids=ids).logits)  # type: ignore[attr-defined, operator]
