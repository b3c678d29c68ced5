"""Operators that combine, order or shift positions along a dimension find the same channels in every block
along it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import made, parameter
from randomly import Between, hold, inputs, sets_of
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("shared_captures")

ALONG_HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda h: torch.roll(h, 1, -2),
    "cumsum": lambda h: h.cumsum(-2),
    "cumprod": lambda h: h.cumprod(-2),
    "cummax": lambda h: h.cummax(-2)[0],
    "logcumsumexp": lambda h: h.logcumsumexp(-2),
    "sort": lambda h: h.sort(-2)[0],
    "argsort": lambda h: h.argsort(-2).to(h.dtype),
    "fourier": lambda h: torch.fft.fft(h, dim=-2).abs(),
    "flipped sum": lambda h: h.flip(-2).cumsum(-2).flip(-2),
    "softmax": lambda h: h.softmax(-2),
    "centred": lambda h: h - h.mean(-2, keepdim=True),
}


@pytest.mark.parametrize("name", ALONG_HEADS)
def test_heads_lose_the_same_channels_where_an_operator_goes_across_them(name: str) -> None:
    analysis = hold(Between(lambda h: ALONG_HEADS[name](h.unflatten(-1, (3, 4))).flatten(-2)), inputs())
    assert sets_of(analysis, "first.weight") == [("prunable", 4, 1)], (
        "four channels, of all three heads at once"
    )


def test_heads_that_only_move_lose_other_channels_each() -> None:
    analysis = hold(Between(lambda h: h.unflatten(-1, (3, 4)).flip(-2).flatten(-2)), inputs())
    assert sets_of(analysis, "first.weight") == [("prunable", 12, 3)]


def test_values_rolled_over_heads() -> None:
    """Attention in which each head takes the values of another."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.out(F.scaled_dot_product_attention(q, k, v.roll(1, 1)).transpose(1, 2).flatten(2))

    model = made(forward, **{name: nn.Linear(8, 12) for name in "qkv"}, out=nn.Linear(12, 8))
    assert sets_of(hold(model, inputs()), "v.weight") == [("prunable", 4, 1)]


@pytest.mark.parametrize(
    ("letters", "sizes"),
    [
        pytest.param(("btd", "betf", "bto"), ((2, 6), (3, 7)), id="over stacked experts"),
        pytest.param(("bed", "bef", "beo"), ((2, 6), (3, 6)), id="over positions with a weight of their own"),
    ],
)
def test_running_sums(letters: tuple[str, str, str], sizes: tuple[tuple[int, int], ...]) -> None:
    """Over what a stack of weights gives; the letters say along which dimension of the input they lie."""

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = F.relu(torch.einsum(f"{letters[0]},edf->{letters[1]}", x, m.into)).cumsum(1)
        return m.head(torch.einsum(f"{letters[1]},efo->{letters[2]}", hidden, m.out))

    count = 3 if "t" in letters[0] else 6
    weights = {"into": parameter(count, 8, 12), "out": parameter(count, 12, 5)}
    analysis = hold(made(forward, **weights, head=nn.Linear(5, 4)), inputs(sizes))
    assert ("prunable", 12, 1) in sets_of(analysis, "into", 2)
