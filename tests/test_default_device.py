"""What torch makes by default somewhere else does not get into the library's own random numbers."""

from __future__ import annotations

import ast
from pathlib import Path

import torch
from fasp_fx.restoration import SKETCHED, _sketch
from fasp_fx.scoring import Columns, Random

import fasp_fx

SOURCES = Path(fasp_fx.__file__).parent


def test_draws_are_the_same_whatever_the_default_device_is() -> None:
    rows = torch.ones(SKETCHED + 3, 2)
    columns = Columns(torch.ones(2, 5), None, None, name="a")
    expected = _sketch(rows), Random(1)(columns)
    with torch.device("meta"):
        found = _sketch(rows), Random(1)(columns)
    for own, other in zip(found, expected, strict=True):
        assert own.device.type == "cpu"
        assert torch.equal(own, other)


def test_every_draw_from_a_generator_says_where() -> None:
    """A generator of the CPU does not draw on another device."""
    silent = []
    for file in SOURCES.rglob("*.py"):
        if file.relative_to(SOURCES).parts[0] in ("testing", "training"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            given = {keyword.arg for keyword in node.keywords} if isinstance(node, ast.Call) else set()
            if "generator" in given and "device" not in given:
                silent.append(f"{file.relative_to(SOURCES)}:{node.lineno}")
    assert not silent
