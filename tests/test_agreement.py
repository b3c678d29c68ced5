"""What is measured on rows that were held out, what sweeps predict, and how both are shown."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import made, two_layers
from torch import Tensor, nn

import fasp_fx
from fasp_fx.allocation import Parameters

BATCHES = [torch.randn(30, 12, generator=torch.Generator().manual_seed(at)) for at in range(8)]


@pytest.fixture(scope="module")
def captured() -> fasp_fx.Captured:
    torch.manual_seed(0)
    return fasp_fx.capture(two_layers().eval(), (BATCHES[0],))


def test_an_error_bar_is_that_of_independent_rows() -> None:
    """Beside many draws of as many rows; and tokens that a mask hides do not count."""
    torch.manual_seed(0)
    rows = torch.randn(4000, 3, 5)
    before, after = nn.Identity(), made(lambda self, x: x + 0.2 * x.sin().roll(1, -1))
    drawn = [fasp_fx.agreement(before, after, [part]) for part in rows.split(40)]
    for name in ("error", "same"):
        values, doubts = zip(*(getattr(agreed, name) for agreed in drawn), strict=True)
        assert np.mean(doubts) == pytest.approx(np.std(values), rel=0.25)
    masked = made(lambda self, x, attention_mask: x * (1 + attention_mask[..., None]))
    mask = (torch.arange(3) < torch.tensor([[1], [3]])).long()
    batch = {"x": rows[:2], "attention_mask": mask}
    agreed = fasp_fx.agreement(made(lambda self, x, attention_mask: x * 2), masked, [batch])
    assert (agreed.error, agreed.same) == ((0.0, 0.0), (1.0, 0.0))


@torch.no_grad()
def test_the_last_eighth_is_seen_by_nothing_else(captured: fasp_fx.Captured) -> None:
    result = fasp_fx.prune(captured, calibration=iter(BATCHES), sparsity=0.4)
    without = fasp_fx.prune(captured, calibration=BATCHES[:7], sparsity=0.4)
    for name, weight in result.module.state_dict().items():
        assert torch.equal(weight, without.module.state_dict()[name])
    dense = captured.program.module
    before, after = dense(BATCHES[7]), result.module(BATCHES[7])
    agreed = result.report.agreement
    assert agreed is not None
    assert agreed.error[0] == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-5)
    assert str(agreed) in str(result.report)
    assert fasp_fx.Report.from_json(result.report.to_json()).agreement == agreed
    assert without.report.agreement is None
    assert "no row held out was run" in str(without.report)
    odd = fasp_fx.prune(captured, calibration=BATCHES[:7], sparsity=0.4, held_out=[BATCHES[7][:, :5]])
    assert odd.report.agreement is None
    assert "could not be run" in str(odd.report)
    given = fasp_fx.prune(captured, calibration=BATCHES[:7], sparsity=0.4, held_out=BATCHES[7:])
    assert given.report.agreement == agreed


@torch.no_grad()
def test_what_was_measured_of_other_weights_is_not_saved(captured: fasp_fx.Captured, tmp_path: Path) -> None:
    result = fasp_fx.prune(captured, calibration=BATCHES, sparsity=0.4)
    loaded = fasp_fx.load(result.save(tmp_path / "measured"))
    assert loaded.report.agreement == result.report.agreement
    next(loaded.module.parameters())[0] *= 1.01
    trained = fasp_fx.load(loaded.save(tmp_path / "trained"))
    assert (trained.report.agreement, trained.report.figures) == (None, ())
    assert "or weights were changed since" in (tmp_path / "trained" / "README.md").read_text("utf-8")
    again = trained.with_report(agreement=fasp_fx.agreement(captured.program.module, trained.module, BATCHES))
    assert fasp_fx.load(again.save(tmp_path / "again")).report.agreement == again.report.agreement is not None


def test_a_model_in_parts_is_measured_as_a_whole() -> None:
    torch.manual_seed(0)

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.part(x) if float(x.sum()) > -1e9 else x

    model = made(forward, part=two_layers())
    result = fasp_fx.prune(model.eval(), (BATCHES[0],), calibration=BATCHES, sparsity=0.4)
    assert result.parts
    assert result.report.agreement == fasp_fx.agreement(model, result.module, BATCHES[7:])


def test_one_measurement_predicts_many_sparsities(captured: fasp_fx.Captured) -> None:
    swept = fasp_fx.sweep(captured, calibration=BATCHES, at=(0.2, 0.4, Parameters(0.5)), measured_at=(0.4,))
    result = fasp_fx.prune(captured, calibration=BATCHES, sparsity=0.4)
    assert swept.measured == {0.4: result.report.agreement}
    point = swept.points[0.4]
    assert (point.sparsity, point.parameters) == (result.report.sparsity, result.report.parameters[1])
    assert f": {point.cost:.3g} ({swept.costs.in_words(point.cost)})" in str(result.report)
    assert swept.points[Parameters(0.5)].parameters <= result.report.parameters[0] / 2
    assert swept.points[0.0].macs == 30 * 2 * 12 * 20
    costs = [each.cost for each in swept.points.values()]
    assert costs == sorted(costs)
    assert len(str(swept).splitlines()) == 5
    assert "40.0%" in str(swept)
    with pytest.raises(fasp_fx.errors.SparsityError, match=r"sparsity=30 is not in \(0, 1\)"):
        fasp_fx.sweep(captured, calibration=pytest.fail, at=(30,))
    with pytest.raises(fasp_fx.ArgumentError, match="measure it anew"):
        fasp_fx.Costs.from_json(swept.costs.to_json()).at(0.2)


def test_a_notebook_shows_what_it_is_given(captured: fasp_fx.Captured) -> None:
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell.instance()
    shell.user_ns |= {"captured": captured, "batches": BATCHES, "fasp_fx": fasp_fx}
    for cell in (
        "swept = fasp_fx.sweep(captured, calibration=batches, measured_at=())\nswept",
        "swept.costs",
        "fasp_fx.analyze(captured)",
        "fasp_fx.prune(captured, calibration=batches)",
    ):
        done = shell.run_cell(cell)
        done.raise_error()
        assert 'srcdoc="&lt;!doctype html' in shell.display_formatter.format(done.result)[0]["text/html"]
