"""Modules import only what docs/architecture.md says they may."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _levels() -> dict[str, int]:
    """The numbered lines of the page, by the names in them."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE)
    return {name: int(number) for number, line in lines for name in re.findall(r"`(\w+)`", line)}


def _files() -> Iterator[tuple[tuple[str, ...], ast.Module]]:
    """Every file of the library, by its dotted name within the package."""
    for folder, base in (
        (ROOT / "fasp_fx", ROOT / "fasp_fx"),
        (ROOT / "passes", ROOT),
        (ROOT / "patterns", ROOT),
    ):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(base).with_suffix("").parts
            if folder.name == "fasp_fx" and parts[0] in ("passes", "patterns", "__init__"):
                continue  # links to the folders that follow; and the package itself, which imports all
            yield parts, ast.parse(file.read_text(encoding="utf-8"))


def _imported(parts: tuple[str, ...], tree: ast.Module) -> Iterator[str]:
    """What of the package a file imports as it is loaded; imports in functions and for type checkers come
    later, or never.
    """
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = ("fasp_fx", *parts)[: -node.level]
            names = (
                [".".join((*base, node.module))]
                if node.module
                else [".".join((*base, alias.name)) for alias in node.names]
            )
        else:
            names = [node.module or ""]
        yield from (name.split(".")[1] for name in names if name.startswith("fasp_fx."))


def test_nothing_imports_what_comes_later() -> None:
    levels, seen = _levels(), 0
    for parts, tree in _files():
        own = levels.get(parts[0])
        for name in _imported(parts, tree):
            if name.startswith("__"):
                continue
            assert own is not None, f"docs/architecture.md does not say where {parts[0]} stands"
            assert name in levels, f"docs/architecture.md does not say where {name} stands"
            assert levels[name] <= own, f"{'/'.join(parts)} imports {name}, which comes later"
            seen += 1
    assert seen > 300
