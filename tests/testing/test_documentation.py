"""The snippets of docs/testing.md and docs/integration.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fasp_fx

PAGE = Path(__file__).resolve().parents[2] / "docs" / "testing.md"
#: those that import what they use; the others are lines for a reader's own file
SNIPPETS = [
    text
    for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    if text.startswith(("import", "from"))
]


@pytest.mark.parametrize("text", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet(text: str) -> None:
    exec(compile(text, str(PAGE), "exec"), {"__name__": "snippet"})


def test_integration_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippets of docs/integration.md run from top to bottom, and the passes between two foreign ones
    take ten lines.
    """
    monkeypatch.chdir(tmp_path)
    page = PAGE.with_name("integration.md")
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    (between,) = (text for text in snippets if "Pipeline" in text)
    assert len([line for line in between.splitlines() if line.strip()]) == 10
    names: dict[str, Any] = {"__name__": "snippet"}
    for text in snippets:
        exec(compile(text, str(page), "exec"), names)
    expected = fasp_fx.apply(names["model"], names["result"].plan, (names["x"],)).module
    other = torch.randn(3, 16)
    with torch.no_grad():
        for module in (names["smaller"].module(), names["pruned"].module(), names["quick"]):
            assert torch.allclose(module(other), expected(other), atol=1e-5)
    assert {"unfold_linear", "decompose_silu"} <= {
        node.meta.get("fasp_fx_pass") for node in names["smaller"].graph.nodes
    }
