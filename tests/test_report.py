"""What a report says in words, and that a failing capture says nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from fasp_fx.report import COLUMNS, Figure, Line, Report
from torch import Tensor, nn
from zoo import randomise

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")


class Normed(nn.Module):
    """A stream through a norm, and neurons beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.up, self.down, self.out = (
            nn.Linear(4, 16),
            nn.LayerNorm(16),
            nn.Linear(16, 20),
            nn.Linear(20, 16),
            nn.Linear(16, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        stream = self.into(x)
        return self.out(stream + self.down(self.up(self.norm(stream)).relu()))


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
    model = randomise(Normed())
    result = fasp_fx.prune(
        model, (torch.randn(3, 4),), score="random", restore=None, sparsity=0.3, include=include
    )
    line = str(result.report).splitlines()[0]
    assert line.endswith(f"of the weights of linear, convolution and recurrent operators in {says}")
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
    {"capture": 1.5},
    ("a note",),
    (Figure("perplexity", 17.5, 22.9, 3),),
    {"my.op": 3},
)


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
        ("seconds", {"a": None}),
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


class Decides(nn.Module):
    """What it computes depends on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() if bool(x.sum() > 0) else x


def test_a_capture_that_fails_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(fasp_fx.CaptureError):
        fasp_fx.analyze(Decides().eval(), (torch.ones(3, 4),))
    assert capfd.readouterr() == ("", "")
