"""Stacks of weights taken one by one, by indices, or twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from randomly import hold, inputs, sets_of
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("shared_captures")


class Stack(nn.Module):
    def __init__(self, take: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.into, self.out = nn.Parameter(torch.randn(3, 12, 8)), nn.Parameter(torch.randn(3, 5, 12))
        self.third, self.last, self.take = nn.Linear(5, 16), nn.Linear(16, 4), take

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.third(self.take(self, x))))


def _looked_up(index: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    def take(module: nn.Module, x: Tensor) -> Tensor:
        hidden = F.relu(torch.einsum("btd,efd->ebtf", x, module.into))
        return torch.einsum("ebtf,eof->bto", hidden, index(module.out))

    return take


ONE_BY_ONE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "unbind": lambda m, x: sum(
        F.linear(F.relu(F.linear(x, w)), v) for w, v in zip(m.into.unbind(0), m.out.unbind(0))
    ),
    "select": lambda m, x: sum(F.linear(F.relu(F.linear(x, m.into[i])), m.out[i]) for i in range(3)),
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_each_of_a_stack_loses_other_channels_down_to_few(name: str) -> None:
    """Which dimension shrinks cannot be told by the steps between the channels that happen to be left."""
    analysis = hold(Stack(ONE_BY_ONE[name]), inputs(), seeds=6)
    assert ("prunable", 36, 3) in sets_of(analysis, "into", 1)


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(lambda v: v[torch.arange(3).flip(0)], id="computed"),
        pytest.param(lambda v: v[[0, 0, 2]], id="one twice"),
        pytest.param(lambda v: v[torch.tensor([2, 0, 1])], id="permuted"),
    ],
)
def test_indices_into_a_stack(index: Callable[[Tensor], Tensor]) -> None:
    analysis = hold(Stack(_looked_up(index)), inputs())
    assert ("prunable", 16, 1) in sets_of(analysis, "third.weight")
