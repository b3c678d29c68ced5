"""An allocation of one's own: a callable from a budget and round_to to what each group loses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import TwoLayers

import fasp_fx
from fasp_fx.allocation import Budget

pytestmark = pytest.mark.usefixtures("shared_captures")


def test_a_callable_decides() -> None:
    seen: list[tuple[int, float, int]] = []

    def allocate(budget: Budget, round_to: int) -> list[int]:
        seen.append((budget.groups[0].width, budget.over([0]), round_to))
        return [7 for _ in budget.groups]

    result = fasp_fx.prune(
        TwoLayers().eval(),
        (torch.randn(2, 12),),
        allocation=allocate,
        sparsity=0.4,
        round_to=2,
        score="magnitude",
        restore=None,
    )
    assert seen == [(20, 0.4, 2)] * len(seen)
    assert result.plan.groups[0].removed_sets == 7
    assert result.report.notes == (
        "the allocation leaves a width that is no multiple of round_to=2 in 'second.weight'",
    )


@pytest.mark.parametrize(("lost", "is_told"), [(2, True), (6, False), (8, False), (14, True)])
def test_a_sparsity_that_is_missed_by_more_than_a_step_is_told(lost: int, is_told: bool) -> None:
    result = fasp_fx.prune(
        TwoLayers().eval(),
        (torch.randn(2, 12),),
        allocation=lambda budget, round_to: [lost],
        sparsity=0.4,
        round_to=2,
        score="magnitude",
        restore=None,
    )
    told = f"the allocation takes {lost / 20:.1%} of the prunable weights, where 40.0% was asked for"
    assert (told in result.report.notes) == is_told


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1, 1], "2 numbers for 1 groups"),
        ([20], "takes 20 channel sets.*from 0 to 19"),
        ([-1], "takes -1"),
        ([0.5], "takes 0.5"),
    ],
)
def test_what_cannot_be_done_is_refused(returned: list[Any], message: str) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=message):
        fasp_fx.prune(
            TwoLayers().eval(),
            (torch.randn(2, 12),),
            allocation=lambda *_: returned,
            score="magnitude",
            restore=None,
        )


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=r"use 'uniform', 'global', 'search', a fasp_fx\."):
        fasp_fx.prune(TwoLayers().eval(), (torch.randn(2, 12),), allocation="globl", restore=None)  # type: ignore[arg-type]
