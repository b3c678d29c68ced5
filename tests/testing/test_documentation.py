"""The snippets of docs/testing.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "testing.md"
#: those that import what they use; the others are lines for a reader's own file
SNIPPETS = [text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S) if text.startswith(("import", "from"))]


@pytest.mark.parametrize("text", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet(text: str) -> None:
    exec(compile(text, str(PAGE), "exec"), {"__name__": "snippet"})
