"""Sizes that vary from call to call beside channels: what the caller lets vary, and what saves hold of it.
Models for which it matters are in corpus/movements.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from corpus.movements import ENTRIES, behind
from torch.export import Dim

import fasp_fx
from fasp_fx.storage import _untrusted

QUICK = {"score": "random", "restore": None, "sparsity": 0.2}


def test_what_the_caller_lets_vary_freezes_what_lies_between() -> None:
    """Widths that may trade with each other leave no fixed place for what lies between."""
    entry, shapes = ENTRIES["inputs side by side"], ({1: Dim.AUTO}, None, {1: Dim.AUTO})
    analysis = fasp_fx.analyze(entry.build(), *entry.inputs()[0], dynamic_shapes=shapes)
    reasons = {group.producers[0].name: group.reason for group in analysis.groups if group.producers}
    assert "a length known only at run time" in reasons["middle.weight"]
    assert [group.producers[0].name for group in analysis.select("prunable")] == ["out.0.weight"]


def test_sizes_in_results_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that is captured again copies no more; sizes too long to be stored are refused in words."""
    x = torch.randn(2, 7, 6)
    result = fasp_fx.prune(behind(), (x,), **QUICK)
    again = fasp_fx.prune(result.module, (x,), **QUICK)
    copies = [
        len(one.program.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default))
        for one in (result, again)
    ]
    assert copies[0] == copies[1]
    monkeypatch.setattr(_untrusted, "PARTS", 1)
    with pytest.raises(fasp_fx.StoreError, match="longer than what is stored"):
        result.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())
