"""The printed groups of every zoo model against golden files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from zoo import ZOO

import fasp_fx

GOLDEN = Path(__file__).parent / "golden"
REGENERATE = os.environ.get("FASP_FX_REGENERATE") == "1"


def printed(name: str, analysis: fasp_fx.Analysis) -> str:
    return (
        "\n".join(
            [
                f"# {name}: {len(analysis.groups)} groups, at most {analysis.max_sparsity:.4f}",
                *map(str, analysis.groups),
            ]
        )
        + "\n"
    )


@pytest.mark.parametrize("name", ZOO)
def test_groups(name: str, zoo_analysis: Callable[[str], fasp_fx.Analysis]) -> None:
    analysis = zoo_analysis(name)
    assert len(analysis.select("prunable")) == 4, (
        "there is a prunable group besides the value channels and the FFN of each layer"
    )
    for group in analysis.groups:
        assert bool(group.reason) == (group.status != "prunable"), (
            f"{group.name} is {group.status} with reason '{group.reason}'"
        )
        together = np.sort(group.sets)
        assert len(np.unique(together)) == group.size
        assert group.size % group.blocks == 0
    file = GOLDEN / f"{name}.txt"
    text = printed(name, analysis)
    if REGENERATE:
        file.write_text(text)
    assert file.read_text() == text, (
        "the printed groups differ from the golden file; if that is meant, regenerate with"
        " FASP_FX_REGENERATE=1"
    )


def test_every_model_is_expected() -> None:
    assert {file.stem for file in GOLDEN.glob("*.txt")} == set(ZOO)
