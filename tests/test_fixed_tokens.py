"""Sequences whose length a weight fixes: tokens are features, and what is computed of their number is
settled.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

TOKENS = 3
#: what cuts or shifts as many tokens as a quarter of them, which is none
PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "cut": lambda x: x[:, : x.shape[1] - x.shape[1] // 4],
    "shifted": lambda x: F.pad(x, (0, 0, x.shape[1] // 4, -(x.shape[1] // 4))),
}


class Mixed(nn.Module):
    """Attention with one weight for queries, keys and values of each head, and then a layer over tokens."""

    def __init__(self, part: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.part = part
        self.qkv, self.out = nn.Linear(6, 2 * 3 * 4), nn.Linear(8, 6)
        self.up, self.down, self.last = nn.Linear(TOKENS, 5), nn.Linear(5, TOKENS), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        heads = self.part(self.qkv(x)).unflatten(-1, (2, 3, 4)).transpose(1, 2)
        query, key, value = heads.unbind(-2)
        x = self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2))
        x = F.pad(x, (0, 0, 0, length))[:, :length]
        return self.last(self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2))


@pytest.mark.parametrize("name", PARTS)
def test_a_fused_weight_is_split_where_tokens_are_features(name: str) -> None:
    torch.manual_seed(0)
    model, x = Mixed(PARTS[name]).double().eval(), torch.randn(2, TOKENS, 6).double()
    result = fasp_fx.prune(model, (x,), score="random", restore=None, sparsity=0.2)
    gone = {part.name for group in result.plan.groups for part in group.consumers}
    assert {"out.weight", "down.weight"} <= gone
    expected = zeroed(model, result.plan)(x)
    assert error(expected, model(x)) > 100 * TOLERANCE
    assert error(result.module(x), expected) <= TOLERANCE


class Halves(nn.Module):
    """Two halves of a layer go on side by side and lie beside what a layer over tokens makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 5)
        self.tokens = nn.Linear(TOKENS, TOKENS)
        self.after, self.other, self.last = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(TOKENS * 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, -1)
        after = self.after(torch.cat([left, right.relu()], -1))
        other = self.other(self.tokens(self.second(x).transpose(1, 2)).transpose(1, 2))
        return self.last((after * other).roll(-1, 1).flatten(1))


def test_a_part_that_has_lost_all_its_channels_has_no_say_on_tokens() -> None:
    torch.manual_seed(0)
    model, x = Halves().double().eval(), torch.randn(2, TOKENS, 6).double()
    with torch.no_grad():
        model.after.weight[:, :2] *= 1e-6  # which go first, and leave nothing of their half
    result = fasp_fx.prune(model, (x,), score="magnitude", restore=None, sparsity={"after.weight": 0.5})
    assert not result.report.notes
    (group,) = result.plan.groups
    assert [(part.name, tuple(part.removed)) for part in group.consumers] == [("after.weight", (0, 1))]
    expected = zeroed(model, result.plan)(x)
    assert error(result.module(x), expected) <= TOLERANCE


#: what takes tokens by a number that is settled only afterwards, and how many are left of five
TAKEN: dict[str, tuple[Callable[[Tensor, int], Tensor], int]] = {
    "all but the last": (lambda x, count: x[:, : count - 1], 4),
    "the second half": (lambda x, count: x[:, count // 2 :], 3),
    "every second": (lambda x, count: x[:, :: count // 2], 3),
    "behind zeros": (lambda x, count: F.pad(x, (0, 0, count // 2, 0)), 7),
    "parts exchanged": (lambda x, count: torch.cat(x.split([count // 2, count - count // 2], 1)[::-1], 1), 5),
    "one in front": (lambda x, count: torch.cat([x[:, count - 2].unsqueeze(1), x], 1), 6),
}


class Taken(nn.Module):
    """Takes some of the tokens that a layer makes, by the number of those of another input."""

    def __init__(self, take: Callable[[Tensor, int], Tensor], left: int) -> None:
        super().__init__()
        self.take = take
        self.up, self.down = nn.Linear(4, 7), nn.Linear(7, 5)
        self.up_again, self.down_again = nn.Linear(left, 4), nn.Linear(4, 5)
        self.own, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        made = self.down(F.gelu(self.up(other))).transpose(1, 2)
        taken = self.take(made, x.shape[1]).transpose(1, 2)
        return self.last(self.down_again(F.gelu(self.up_again(taken))).transpose(1, 2) + self.own(x))


@pytest.mark.parametrize("name", TAKEN)
def test_tokens_are_taken_by_a_number_that_is_settled_afterwards(name: str) -> None:
    torch.manual_seed(0)
    model = Taken(*TAKEN[name]).double().eval()
    args = torch.randn(2, 5, 6).double(), torch.randn(2, 8, 4).double()
    result = fasp_fx.prune(model, args, score="random", restore=None, sparsity=0.5)
    assert not result.report.notes
    assert "up_again.weight" in {part.name for group in result.plan.groups for part in group.consumers}
    others = torch.randn(3, 5, 6).double(), torch.randn(3, 8, 4).double()
    for given in (args, others):
        expected = zeroed(model, result.plan)(*given)
        assert error(expected, model(*given)) > 100 * TOLERANCE
        assert error(result.module(*given), expected) <= TOLERANCE
