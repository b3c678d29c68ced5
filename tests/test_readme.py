"""The Python in the README and on pages of docs/ runs as printed."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fasp_fx

ROOT = Path(__file__).resolve().parents[1]


def _blocks(page: str = "README.md") -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def _run(blocks: list[str], names: dict[str, Any]) -> dict[str, Any]:
    for text in blocks:
        exec(compile(text, "page", "exec"), names)
    return names


def test_python_blocks_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has everything imported, but in a namespace of their own."""
    blocks = _blocks()
    assert blocks
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in a program: a warning does not end it
        runpy.run_path(str(program), run_name="__main__")
    out = capsys.readouterr().out
    assert "torch.Size([3, 4])" in out
    assert "can be removed" in out
    assert (tmp_path / "smaller" / "manifest.json").is_file()


def test_commands_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for script in ("scripts/prune-smollm2", "scripts/test", ".ci/run"):
        assert script in text
        assert (ROOT / script).stat().st_mode & 0o111, f"{script} is not executable"


def test_quick_start_is_short() -> None:
    assert len([line for line in _blocks()[0].splitlines() if line.strip()]) <= 15


#: those that import what they use; the others are lines for a reader's own file
SNIPPETS = [text for text in _blocks("docs/testing.md") if text.startswith(("import", "from"))]


@pytest.mark.parametrize("text", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_of_the_page_on_testing(text: str) -> None:
    _run([text], {"__name__": "snippet"})


def test_integration_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippets of docs/integration.md run from top to bottom, and the passes between two foreign ones
    take eight lines.
    """
    monkeypatch.chdir(tmp_path)
    snippets = _blocks("docs/integration.md")
    (between,) = (text for text in snippets if "Pipeline" in text)
    assert len([line for line in between.splitlines() if line.strip()]) == 8
    names = _run(snippets, {"__name__": "snippet"})
    expected = fasp_fx.apply(names["model"], names["result"].plan, (names["x"],)).module
    other = torch.randn(3, 16)
    with torch.no_grad():
        for module in (names["smaller"].module(), names["quick"]):
            assert torch.allclose(module(other), expected(other), atol=1e-5)
    assert "unfold_linear" in {node.meta.get("fasp_fx_pass") for node in names["smaller"].graph.nodes}


@pytest.mark.slow
def test_generation_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = _run(_blocks("docs/generation.md"), {"__name__": "page"})
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(names["loaded"](input_ids=ids).logits, names["pruned"].model(input_ids=ids).logits)
