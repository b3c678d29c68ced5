"""The Python in the README runs as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_python_blocks_run_in_order(tmp_path: Path) -> None:
    blocks = _blocks()
    assert blocks
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "ignore", str(program)], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([3, 4])" in done.stdout
    assert "can be removed" in done.stdout
    assert (tmp_path / "smaller" / "manifest.json").is_file()


def test_commands_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for script in ("scripts/prune-smollm2", "scripts/test", ".ci/run"):
        assert script in text
        assert (ROOT / script).stat().st_mode & 0o111, f"{script} is not executable"


def test_quick_start_is_short() -> None:
    assert len([line for line in _blocks()[0].splitlines() if line.strip()]) <= 15
