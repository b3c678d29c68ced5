"""What pages of the documentation name is there: files, and where links lead. Anchors: ``scripts/docs``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")]
PAGES += ROOT.glob("fasp_fx/**/README.md")
#: pages that name files of the past
PAST = {"benchmarks.md", "CHANGELOG.md"}


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def is_there(name: str, page: Path) -> bool:
    """A path is below the repository, below fasp_fx, or beside the page; a bare name anywhere in the code."""
    if "/" in name:
        return any((base / name).is_file() for base in (ROOT, ROOT / "fasp_fx", page.parent))
    tops = ("fasp_fx", "passes", "patterns", "tests", "benchmarks", "examples")
    return any(True for top in tops for _ in (ROOT / top).rglob(name))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in PAST], ids=ids)
def test_files_that_are_named_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`([\w./]+\.pyi?)\b", text))
    assert sorted(name for name in named if not is_there(name, page)) == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []
