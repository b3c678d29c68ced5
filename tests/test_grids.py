"""Channels that a reshape lays beside all of a grid of constants, along one dimension, can go, each with its
whole run.
"""

from __future__ import annotations

import pytest
import torch
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, nn
from zoo import randomise

import fasp_fx
from fasp_fx.testing import check_program

pytestmark = pytest.mark.usefixtures("shared_captures")


class Expanded(nn.Module):
    """Two layers on radial basis functions of one grid, a buffer (FastKAN)."""

    def __init__(self, is_outer: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(32, 5), nn.Linear(20, 3)
        self.grid: Tensor
        self.register_buffer("grid", torch.linspace(-2, 2, 4))
        self.is_outer = is_outer

    def expand(self, x: Tensor) -> Tensor:
        apart = x[..., None, :] - self.grid[:, None] if self.is_outer else x[..., None] - self.grid
        return torch.exp(-(apart**2)).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.third(self.expand(self.second(self.expand(self.first(x)))))
        return found


class Scaled(nn.Module):
    """Heads with a gain of their own, a buffer: the channels of a head vary along it, so that it is no
    product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 3)
        self.gain: Tensor
        self.register_buffer("gain", torch.linspace(0.5, 1.5, 3))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(x).unflatten(-1, (3, 4)) * self.gain[:, None]
        found: Tensor = self.down(heads.tanh().flatten(-2))
        return found


@pytest.mark.parametrize("is_outer", [False, True], ids=["inner grid", "outer grid"])
def test_whole_runs_go(is_outer: bool) -> None:
    model, x = randomise(Expanded(is_outer), std=0.4), torch.randn(7, 6)
    found = fasp_fx.analyze(model, (x,))
    groups = {"second.weight": 8, "third.weight": 5}
    assert {group.name: group.size for group in found.groups if group.status == "prunable"} == groups
    result = fasp_fx.prune(model, (x,), sparsity=0.4, score="magnitude", restore=None)
    assert {group.name for group in result.plan.groups} == groups.keys()
    dense = zeroed(model, result.plan)
    for batch in (x, torch.randn(12, 6)):
        assert error(result.module(batch), dense(batch)) < TOLERANCE
    check_program(model, (x,), invariants=("mask-exact", "plan", "steps", "restored"))


def test_a_gain_of_heads_is_no_product() -> None:
    model, x = randomise(Scaled()), torch.randn(7, 6)
    result = fasp_fx.prune(model, (x,), sparsity=0.4, score="magnitude", restore=None)
    assert error(result.module(x), zeroed(model, result.plan)(x)) < TOLERANCE
