"""What is measured of the parts of a model is of one unit, and what was missed of the whole is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import block, made, wide
from torch import Tensor, nn

import fasp_fx
from fasp_fx.errors import CalibrationWarning

DATA = [torch.randn(64, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def _part(rounds: bool = False) -> nn.Module:
    """A block whose outputs are whole numbers, through which nothing runs back, if it ``rounds``."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = x + block(self, x)
        return torch.round(y * 16).int().float() / 16 if rounds else y

    return wide(forward, size=16, hidden=32)


def parts(first: bool, second: bool) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        for part in (self.first, self.second, self.third):
            x = part(x * 0 if float(x.detach().sum()) > 1e9 else x)
        return x

    torch.manual_seed(1)
    return made(forward, first=_part(first), second=_part(second), third=_part())


def lost(result: Any) -> dict[str, int]:
    return {group.name: group.removed_sets for group in result.plan.groups}


@pytest.mark.parametrize("first", [pytest.param(True, marks=pytest.mark.slow), False])
def test_all_parts_are_measured_without_gradients_once_one_has_none(first: bool) -> None:
    model = parts(first, not first)
    with pytest.warns(
        CalibrationWarning, match=f"in all parts of the model, since part '{'first' if first else 'second'}'"
    ) as told:
        found = fasp_fx.prune(model, (DATA[0],), calibration=DATA, sparsity=0.3)
    assert len([one for one in told if one.category is CalibrationWarning]) == 1
    asked = fasp_fx.prune(model, (DATA[0],), calibration=DATA, sparsity=0.3, loss=None)
    assert lost(found) == lost(asked)
    for own, other in zip(found.module.parameters(), asked.module.parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("data", [None, DATA])
def test_random_scores_are_others_in_each_part(data: Any) -> None:
    """Parts are alike, and so are the names in them."""
    result = fasp_fx.prune(
        parts(False, False),
        (DATA[0],),
        calibration=data,
        sparsity=0.3,
        score="random",
        allocation="uniform",
        restore=None,
    )
    assert len({tuple(group.consumers[0].removed) for group in result.plan.groups}) == 3
