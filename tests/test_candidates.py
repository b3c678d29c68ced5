"""The best of several prunings to one budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_costs import DATA, Deep, Linear

import fasp_fx
from fasp_fx.allocation import Budget, Global, Target
from fasp_fx.candidates import Varied, best_of

pytestmark = pytest.mark.usefixtures("shared_captures")


@given(seed=st.integers(0, 99), spread=st.floats(0, 1), sparsity=st.floats(0.1, 0.8))
def test_every_candidate_meets_the_budget(seed: int, spread: float, sparsity: float) -> None:
    counted = Linear([40, 30, 20], [1, 2, 3])
    curves = {
        str(index): fasp_fx.CostCurve(np.arange(group.width + 1) ** 2 * (index + 1.0))
        for index, group in enumerate(counted.groups)
    }
    budget = Budget(counted.groups, [Target(counted, sparsity)])
    lost = Varied(seed, spread)(budget, 1, fasp_fx.Costs(curves, ""))
    assert abs(counted.removed(lost) - sparsity) <= 3 / counted.whole
    if spread == 0:
        assert lost == Global()(budget, 1, fasp_fx.Costs(curves, ""))


def test_the_best_is_returned_and_the_first_is_the_default() -> None:
    model = Deep().eval()
    captured = fasp_fx.capture(model, (DATA[0],))
    options: dict[str, Any] = {
        "calibration": DATA,
        "sparsity": 0.4,
        "costs": fasp_fx.measure(captured, calibration=DATA[:2]),
    }
    held = torch.randn(100, 8)
    seen: list[fasp_fx.Result] = []

    def prune(allocation: Any) -> fasp_fx.Result:
        seen.append(fasp_fx.prune(captured, allocation=allocation, **options))
        return seen[-1]

    def judge(result: fasp_fx.Result) -> float:
        with torch.no_grad():
            return -float((result.module(held) - model(held)).norm())

    best = best_of(5, prune, judge, spread=1.0)
    worth = [judge(result) for result in seen]
    assert best.worth == tuple(worth)
    assert best.result is seen[best.index]
    assert worth[best.index] == max(worth)
    assert seen[0].plan == fasp_fx.prune(captured, allocation="global", **options).plan
    assert len({str(result.plan.groups) for result in seen}) > 1, "all candidates are the same"
    assert all(abs(result.report.sparsity - 0.4) < 0.02 for result in seen)


def test_a_candidate_without_a_finite_worth_is_never_the_best() -> None:
    worth = iter([float("nan"), -3.0, float("-inf"), -2.0])
    best = best_of(4, lambda allocation: allocation, lambda made: next(worth))
    assert best.index == 3
    assert isinstance(best.result, Varied)


@pytest.mark.parametrize("number", [0, True, 2.0])
def test_a_number_that_is_none_is_refused(number: Any) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match="number="):
        best_of(number, lambda allocation: None, lambda made: 0.0)


@pytest.mark.parametrize(
    ("found", "said"),
    [("much", "returned a str"), (None, "returned a NoneType"), (float("nan"), "no candidate")],
)
def test_a_judge_that_says_nothing_is_refused(found: Any, said: str) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=said):
        best_of(2, lambda allocation: None, lambda made: found)


@pytest.mark.parametrize("spread", [-0.1, float("inf"), "wide"])
def test_a_spread_that_is_none_is_refused(spread: Any) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match="spread="):
        Varied(0, spread)
