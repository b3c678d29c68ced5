"""Budgets of latency: what a table of timings says is met, and tables are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fasp_fx.budgets import Latency, Parameters
from fasp_fx.latency import LatencyTable
from rank import llama, tokens
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import randomise

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

FAST: dict[str, Any] = {"score": "magnitude", "restore": None}


def operations(call: Callable[[], Any], device: torch.device) -> float:
    """In the place of a clock: a nanosecond for each operation, of which calls that multiply nothing have
    none.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() * 1e-9


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep, self.point = (
            nn.Conv2d(3, 24, 3, padding=1),
            nn.Conv2d(24, 24, 3, padding=1, groups=24),
            nn.Conv2d(24, 32, 1),
        )
        self.grouped, self.head = nn.Conv2d(32, 32, 3, groups=4), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.deep(self.stem(x).relu()).relu()).relu()
        return self.head(self.grouped(x).relu().mean((2, 3)))


def models() -> dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    chain = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
    return {
        "chain": (randomise(chain), (torch.randn(16, 8),), {}),
        "pictures": (randomise(Pictures()), (torch.randn(2, 3, 12, 12),), {}),
        "llama": (llama(), (), {"input_ids": tokens()[0], "use_cache": False}),
    }


@pytest.mark.parametrize("name", ["chain", "pictures", "llama"])
@pytest.mark.parametrize("share", [0.9, 0.7])
def test_what_is_asked_for_is_met_and_what_is_promised_kept(name: str, share: float) -> None:
    """Operations are products of widths, which lines between the grid's points give without error."""
    model, args, kwargs = models()[name]
    table = LatencyTable(time=operations)
    result = fasp_fx.prune(model, args, kwargs, budget=Latency(share, table), **FAST)
    (spent,) = result.report.budgets
    assert spent.used <= spent.allowed == pytest.approx(share * spent.dense)
    assert spent.used > 0.9 * spent.allowed
    device = torch.device("cpu")
    dense, pruned = (
        operations(lambda module=module: module(*args, **kwargs), device) * 1e6
        for module in (model, result.module)
    )  # type: ignore[misc]
    assert spent.dense == pytest.approx(dense, rel=0.02)
    assert spent.used == pytest.approx(pruned, rel=0.03)


def test_a_table_is_kept(tmp_path: Path) -> None:
    model, args, _ = models()["chain"]
    table = LatencyTable(time=operations)
    first = fasp_fx.prune(model, args, budget=Latency(0.8, table), **FAST)
    table.save(tmp_path / "table.json")
    found = LatencyTable.load(tmp_path / "table.json")
    assert len(found) == len(table) > 0
    asked = []

    def counted(call: Callable[[], Any], device: torch.device) -> float:
        asked.append(call)
        return operations(call, device)

    found.time = counted
    second = fasp_fx.prune(model, args, budget=(Latency(0.8, found), Parameters(0.95)), **FAST)
    assert not asked
    assert first.report.budgets[0].used == pytest.approx(second.report.budgets[0].used, rel=0.05)
    assert "microseconds" in str(second.report)


def test_all_count_for_as_much_more_as_the_whole_pass_takes() -> None:
    model, args, _ = models()["chain"]
    whole = operations(lambda: model(*args), torch.device("cpu"))

    def slow_pass(call: Callable[[], Any], device: torch.device) -> float:
        spent = operations(call, device)
        return spent * (3 if spent >= whole else 1)

    found = [
        fasp_fx.prune(model, args, budget=Latency(0.8, LatencyTable(time=clock)), **FAST)
        for clock in (operations, slow_pass)
    ]
    first, second = (result.report.budgets[0] for result in found)
    assert second.dense == pytest.approx(3 * first.dense)
    assert second.used == pytest.approx(3 * first.used)
    assert found[0].plan.groups == found[1].plan.groups


def test_samples_are_timed_as_they_were_given() -> None:
    """As many as in the example, of which a single one is captured twice, and two that are equal are two."""
    model, _, _ = models()["chain"]
    for given in (torch.ones(2, 8), torch.randn(2, 8), torch.ones(1, 8)):
        result = fasp_fx.prune(model, (given,), budget=Latency(0.9, LatencyTable(time=operations)), **FAST)
        microseconds = operations(lambda given=given: model(given), torch.device("cpu")) * 1e6  # type: ignore[misc]
        assert result.report.budgets[0].dense == pytest.approx(microseconds)


def test_a_table_tells_types_apart() -> None:
    """The whole pass takes what the clock says of its type, whatever the table has seen before."""

    def by_type(call: Callable[[], Any], device: torch.device) -> float:
        return operations(call, device) * (7 if call().dtype == torch.float64 else 1)

    model, (x,), _ = models()["chain"]
    table = LatencyTable(time=by_type)
    microseconds = operations(lambda: model(x), torch.device("cpu")) * 1e6
    for dtype, times in ((torch.float32, 1), (torch.float64, 7)):
        result = fasp_fx.prune(model.to(dtype), (x.to(dtype),), budget=Latency(0.9, table), **FAST)
        assert result.report.budgets[0].dense == pytest.approx(times * microseconds)


def test_a_share_out_of_reach() -> None:
    model, args, _ = models()["chain"]
    with pytest.raises(fasp_fx.errors.BudgetError, match="out of reach"):
        fasp_fx.prune(model, args, budget=Latency(0.001, LatencyTable(time=operations)), **FAST)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data | {"format": "other"},
        lambda data: data | {"entries": {"a": {"parts": [[0.5, 1]], "seconds": [1.0]}}},
        lambda data: data | {"entries": {"a": {"parts": [[1]], "seconds": [-1.0]}}},
        lambda data: data | {"entries": []},
        lambda data: [],
    ],
)
def test_a_damaged_table_is_refused(damage: Callable[[Any], Any], tmp_path: Path) -> None:
    LatencyTable().save(tmp_path / "table.json")
    data = json.loads((tmp_path / "table.json").read_text())
    (tmp_path / "table.json").write_text(json.dumps(damage(data)))
    with pytest.raises(fasp_fx.ArgumentError, match="no latency table"):
        LatencyTable.load(tmp_path / "table.json")


@pytest.mark.parametrize("seconds", [float("nan"), -1.0, "x", None])
def test_what_is_no_number_of_seconds_is_refused(seconds: Any) -> None:
    model, args, _ = models()["chain"]
    with pytest.raises(fasp_fx.errors.BudgetError, match="no number of seconds"):
        fasp_fx.prune(
            model, args, budget=Latency(0.8, LatencyTable(time=lambda call, device: seconds)), **FAST
        )


def test_what_is_no_table_no_device_and_no_file(tmp_path: Path) -> None:
    table: Any = "table.json"
    with pytest.raises(fasp_fx.ArgumentError, match="table is a str"):
        Latency(0.8, table)
    with pytest.raises(fasp_fx.ArgumentError, match="none that is here"):
        LatencyTable("no device")
    with pytest.raises(fasp_fx.errors.StoreError, match="not replaced"):
        LatencyTable().save(tmp_path)


def test_a_table_of_another_device_is_refused() -> None:
    model, args, _ = models()["chain"]
    table = LatencyTable(time=operations)
    table.device = "some other device"
    with pytest.raises(fasp_fx.errors.BudgetError, match="some other device"):
        fasp_fx.prune(model, args, budget=Latency(0.8, table), **FAST)


def test_models_that_generate_have_no_example_of_the_users() -> None:
    import fasp_fx.hf

    with pytest.raises(fasp_fx.ArgumentError, match="latency"):
        fasp_fx.hf.prune(
            llama(), None, calibration=[{"input_ids": ids} for ids in tokens()], budget=Latency(0.8)
        )
