"""Dimensions of one position look like dimensions without channels: what the graph still shows of them,
before and after pruning.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fasp_fx
from fasp_fx.testing import check_program


class Appended(nn.Module):
    """A single channel is appended to others, and all of them are added to channels of another producer."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.say, self.one, self.more, self.out = (
            nn.Linear(4, 6),
            nn.Linear(6, 1),
            nn.Linear(4, 7),
            nn.Linear(7, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        said = self.say(x).tanh()
        longer = torch.cat([said, self.one(said)], -1)
        more = self.more(x)
        return self.out((more + longer if self.last else longer + more).tanh())


class Stacked(nn.Module):
    """Three experts, all of them asked, each of which reads ``width`` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(5, width), nn.Linear(4, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, width, 8)), nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        told = torch.bmm(self.into(x).expand(3, -1, -1), self.up).tanh()
        return self.out(torch.bmm(told, self.down).sum(0))


class Batched(nn.Module):
    """Two matrices stored side by side are contracted with what depends on the input, and added to two
    others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add, self.out = nn.Parameter(torch.randn(2, 2, 2)), nn.Parameter(torch.randn(2, 2))
        self.first, self.second = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.add, self.first.view(2, 2, 2), self.second + x).transpose(0, -1) @ self.out


def test_a_position_without_channel_hides_no_channel_that_it_is_added_to() -> None:
    for last in (False, True):
        model, x = Appended(last).eval(), torch.randn(2, 4)
        groups = fasp_fx.analyze(model, (x,)).groups
        (kept,) = [group for group in groups if group.reason is not None and "not a channel" in group.reason]
        assert [str(member) for member in (*kept.producers, *kept.consumers)] == [
            "more.weight[0] 6",
            "more.bias[0] 6",
            "out.weight[1] 6",
        ]
        assert any(group.status == "prunable" and group.size == 6 for group in groups)


def test_channels_go_until_one_is_left_beside_the_appended_one() -> None:
    for last in (False, True):
        torch.manual_seed(0)
        model, x = Appended(last).double().eval(), torch.randn(2, 4, dtype=torch.float64)
        for sparsity in (None, fasp_fx.analyze(model, (x,)).max_sparsity):
            check_program(model, (x,), sparsity=sparsity, invariants=("mask-exact", "steps"))


def test_experts_that_read_one_channel_have_neurons_of_their_own() -> None:
    x = torch.randn(6, 5)
    for width in (1, 2):
        assert any(
            "3 x 8  up[2 x 3] -> down[1 x 3]" in str(group)
            for group in fasp_fx.analyze(Stacked(width).eval(), (x,)).groups
        )


def test_a_plan_made_before_experts_read_one_channel_goes_on_after() -> None:
    torch.manual_seed(0)
    model, x = Stacked(2).double().eval(), torch.randn(6, 5, dtype=torch.float64)
    for seed in (1, 2):
        check_program(model, (x,), seed=seed, invariants=("mask-exact", "steps"))


def test_the_last_channel_of_the_only_matrix_left_proves_nothing() -> None:
    torch.manual_seed(0)
    model, x = Batched().double().eval(), torch.randn((), dtype=torch.float64)
    most = fasp_fx.analyze(model, (x,)).max_sparsity
    for seed in range(4):
        verdict = check_program(model, (x,), seed=seed, sparsity=most, invariants=("mask-exact",))
        assert verdict.removed == 2
