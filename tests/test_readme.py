"""The Python in the README runs as printed."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _blocks() -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```$",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        flags=re.MULTILINE | re.DOTALL,
    )


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
