"""What a report says in words, and that a failing capture says nothing else."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import block, made, randomise, wide
from torch import nn

import fasp_fx
from fasp_fx.pruning import Figure, Line, Report
from fasp_fx.pruning._report import COLUMNS


def _normed() -> nn.Module:
    """A stream through a norm, and neurons beside it."""
    return wide(
        lambda self, x: self.out((stream := self.into(x)) + block(self, self.norm(stream))),
        size=16,
        hidden=20,
        into=nn.Linear(4, 16),
        norm=nn.LayerNorm(16),
        out=nn.Linear(16, 3),
    )


@pytest.mark.parametrize(
    ("include", "says", "counted"),
    [
        ((), "prunable and exempt groups", ("up", "down")),
        (("approximate",), "prunable, exempt and approximate groups", ("into", "up", "down", "out")),
    ],
)
def test_sparsity_is_a_fraction_of_what_the_report_says(
    include: tuple[str, ...], says: str, counted: tuple[str, ...]
) -> None:
    model = randomise(_normed())
    result = fasp_fx.prune(
        model, (torch.randn(3, 4),), score="random", restore=None, sparsity=0.3, include=include
    )
    line = str(result.report).splitlines()[0]
    assert f"of the weights of linear, convolution and recurrent operators in {says}: " in line
    before, after = (
        sum(dict(module.named_parameters())[f"{name}.weight"].numel() for name in counted)
        for module in (model, result.module)
    )
    assert f"{1 - after / before:.2%} " in line
    assert str(Report.from_json(result.report.to_json())) == str(result.report)


REPORT = Report(
    0.25,
    0.25,
    (100, 80),
    (400, 320),
    (Line("a.weight", "prunable", 8, 6, 1, "", 0.1, 0.01, 0.2, 0.02, (("b.weight", 0),), (("a", 1),)),),
    ("a note",),
    (Figure("perplexity", 17.5, 22.9, 3),),
    {"my.op": 3},
)


def test_what_a_file_leaves_out_is_unknown() -> None:
    line = dataclasses.replace(REPORT.lines[0], error_cut=None, error_restored=None)
    shown = str(Report.from_json(dataclasses.replace(REPORT, lines=(line,)).to_json())).splitlines()
    assert all("unknown" in line for line in shown[1:3])


def test_the_columns_are_explained_where_they_hold_something() -> None:
    for line in COLUMNS:
        assert line in str(REPORT)
        assert line not in str(replace(REPORT, lines=()))


def test_a_report_comes_back_from_json() -> None:
    assert Report.from_json(REPORT.to_json()) == REPORT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("sparsity", value) for value in ("0.2", None)),
        *(("bytes", value) for value in (None, [1], [1, 2, 3], [-1, 2], [float("inf"), 2], [10**400, 1])),
        *(("lines", value) for value in ("text", [{}], [[]], [{"name": "a", "before": 10**400}])),
        *(("notes", value) for value in ([3], "text")),
        ("without_rule", {"a": 0.5}),
        ("figures", [{"what": "x", "dense": 1.0, "pruned": 1.0, "digits": 10**9}]),
        *(
            ("config", value)
            for value in (3, {}, [], {"format": "fasp_fx.document/1", "kind": "config", "sparsity": 7})
        ),
    ],
)
def test_a_damaged_report_is_refused(field: str, value: Any) -> None:
    with pytest.raises(fasp_fx.StoreError, match=r"the report is damaged.*save the result again"):
        Report.from_json(json.dumps({**json.loads(REPORT.to_json()), field: value}))


def test_a_capture_that_fails_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = made(lambda self, x: x.sin() if bool(x.sum() > 0) else x)
    with pytest.raises(fasp_fx.CaptureError):
        fasp_fx.analyze(model, (torch.ones(3, 4),))
    assert capfd.readouterr() == ("", "")


def test_one_short_line() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4)).eval()
    data = [torch.randn(64, 16) for _ in range(4)]
    captured = fasp_fx.capture(model, (data[0],))
    costs = fasp_fx.measure(captured, calibration=data)
    result = fasp_fx.prune(captured, calibration=data, sparsity=0.5)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, result.module))
    sparsity = f"{result.report.sparsity:.4f}"
    assert repr(captured) == "Captured(programs={'': Program(6 weights, inputs=['input'])})"
    assert repr(fasp_fx.analyze(captured)) == "Analysis(2 frozen, 2 prunable)"
    assert repr(costs) == f"Costs(2 curves, score={costs.score!r})"
    assert repr(result) == f"Result(sparsity={sparsity}, parameters={before:,} -> {after:,})"
    assert repr(result.report) == f"Report(sparsity={sparsity}, parameters={before:,} -> {after:,})"
    assert repr(result.plan) == f"PruningPlan(2 groups, sparsity={sparsity})"
