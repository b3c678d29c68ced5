"""Attributes that are widths and something else: a copy is right on every length, batch and mode that it and
the program take, or refused.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import PROFILE
from torch import Tensor, nn

import fasp_fx
from fasp_fx.capturing import capture
from fasp_fx.errors import CallError, EagerError, NothingPrunableError
from fasp_fx.passes import finish
from fasp_fx.pruning._eager import first_difference
from fasp_fx.testing.oracle import Masked, error

TOLERANCE = 1e-4
#: widths that arrive as they are at an operator
SEEN = ("view", "norm", "expanded", "zeros", "none")
#: what reads the caller's model, and what an exporter does not assume the same of in every capture: strides
REFUSED = ("held", "strided")
#: modules that are drawn
COUNT = 500 if PROFILE == "slow" else 12


def _widths() -> dict[str, Callable[[Any, Tensor], Tensor]]:
    """Ways in which ``f`` is the width of the hidden layer, by name."""
    return {
        "view": lambda m, h: h.reshape(h.shape[0], -1, m.f),
        "half": lambda m, h: h.reshape(*h.shape[:2], 2, m.f // 2).flatten(2),
        "halves": lambda m, h: torch.cat(h.split([m.f // 2, m.f // 2], -1), -1),
        "norm": lambda m, h: F.layer_norm(h, (m.f,)) if m.normed else h.view(*h.shape[:-1], m.f),
        "expanded": lambda m, h: h * m.gain.expand(m.f),
        "zeros": lambda m, h: h + h.new_ones(m.f),
        "added": lambda m, h: F.pad(h, (0, 3)).view(*h.shape[:-1], m.f + 3)[..., : m.f],
        "flat": lambda m, h: h.view(h.shape[0] * m.f, -1).view(h.shape),
        "asked": lambda m, h: h if h.shape[-1] == m.f else h * 2,
        "none": lambda m, h: h,
    }


def _others() -> dict[str, Callable[[Any, Tensor], Tensor]]:
    """What the number ``g`` is besides, by name; it is ``f`` itself, or another attribute of that value."""
    return {
        "window": lambda m, x: F.pad(x[:, -m.g :], (0, 0, 0, 2)),
        "window of a sum": lambda m, x: x[:, : m.g + 2],
        "modulus": lambda m, x: x * (torch.arange(x.shape[1]) % m.g)[:, None],
        "least": lambda m, x: x * min(x.shape[1], m.g),
        "most": lambda m, x: x[:, : max(x.shape[1] - m.g, 3)],
        "clamped": lambda m, x: (8 * x).clamp(-m.g, m.g),
        "threshold": lambda m, x: x * ((30 * x).abs() > m.g),
        "long": lambda m, x: x.flip(1) if x.shape[1] > m.g - 4 else x,
        "many": lambda m, x: x.flip(0) if x.shape[0] < m.g - 30 else x,
        "strided": lambda m, x: x[:, :: max(1, m.g // 20)],
        "scale": lambda m, x: x * m.g**-0.5,
        "divided": lambda m, x: x / m.g,
        "band": lambda m, x: torch.ones(m.g, m.g).tril()[: x.shape[1], : x.shape[1]] @ x,
        "table": lambda m, x: x + torch.arange(m.g).float()[: x.shape[1], None],
        "near": lambda m, x: (
            ((torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs() < m.g).float() @ x
        ),
        "flag": lambda m, x: x.tanh() if m.g > 40 else x,
        "equal": lambda m, x: x.tanh() if m.g == 48 else x,
        "repeated": lambda m, x: x.repeat(1, max(1, m.g // 24), 1),
        "chosen": lambda m, x: x[:, (torch.arange(3) * m.g) % x.shape[1]],
        "topped": lambda m, x: x.topk(min(m.g, x.shape[-1] // 2), -1).values.repeat(1, 1, 2),
        "held": lambda m, x: m.kept(x),
        "nothing": lambda m, x: x,
    }


class Drawn(nn.Module):
    """A feed-forward net over sequences.

    Args:
        seed: what it is drawn by.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        drawn = random.Random(seed)
        self.width, self.other = drawn.choice(sorted(_widths())), drawn.choice(sorted(_others()))
        width = drawn.choice([40, 48, 64])
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)
        self.gain, self.normed = nn.Parameter(torch.rand(1) + 1), False
        self.held, self.value, self.apart = drawn.random() < 0.7, width, drawn.random() < 0.4
        self.limit = width  # what g is where it is apart
        drop = drawn.random() < 0.5
        owner = self

        def kept(x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, owner.training) if drop else x * owner.gain

        self.kept = kept if self.other == "held" else None

    @property
    def f(self) -> int:
        return self.value if self.held else self.up.out_features

    @property
    def g(self) -> int:
        return self.limit if self.apart else self.f

    def forward(self, x: Tensor) -> Tensor:
        x = _others()[self.other](self, x)
        return x + self.down(_widths()[self.width](self, self.up(x).relu()))


def _calls() -> list[Tensor]:
    """Inputs of lengths and batches on both sides of any attribute's old and new value."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 5), (3, 7), (6, 12), (20, 30), (2, 34), (12, 44), (2, 47), (3, 61), (25, 70)]
    return [torch.randn(*size, 8, generator=generator) for size in sizes]


@pytest.mark.parametrize("seed", range(COUNT))
def test_a_copy_is_right_wherever_it_and_the_program_run(seed: int) -> None:
    torch.manual_seed(seed)
    model = Drawn(seed).eval()
    try:
        result = fasp_fx.prune(
            model, (torch.randn(2, 6, 8),), sparsity=0.3, score="random", restore=None, round_to=2
        )
    except NothingPrunableError:
        return
    try:
        copy = result.eager(model)
    except EagerError:
        is_one_size = model.apart or model.other == "nothing"
        assert model.other in REFUSED or model.width not in SEEN or not is_one_size
        return
    assert model.other != "held", "it reads the caller's model"
    masked, compared = Masked(model, result.plan), 0
    for x in _calls():
        with torch.no_grad(), contextlib.suppress(CallError):
            expected = result.module(x)
            compared += 1
            assert error(expected, masked(x)) < TOLERANCE
            assert error(copy(x), expected) < TOLERANCE
    assert compared


class Computing(nn.Module):
    """What a function makes of a layer's output and of some counts."""

    def __init__(self, of: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.of = nn.Linear(8, 12), of

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return self.of(self.layer(x), counts)


def _scaled(hidden: Tensor, first: Tensor, second: Tensor, which: int) -> Tensor:
    return (hidden + first + second) * (first, second)[which].item()


#: functions each of which differs from the one before it in one thing
UNLIKE: dict[str, list[Callable[[Tensor, Tensor], Tensor]]] = {
    "constant": [lambda h, n: h * 0.5, lambda h, n: h * 0.25],
    "constant of a coarse type": [
        lambda h, n, value=value: h.bfloat16() * torch.tensor(value, dtype=torch.bfloat16)
        for value in (0.25, 0.316)
    ],
    "wiring": [lambda h, n: h.sin() - h, lambda h, n: h - h.sin()],
    "operator": [lambda h, n: h.sin(), lambda h, n: h.cos()],
    "parts": [lambda h, n: h.chunk(2, -1)[0].sin(), lambda h, n: h.chunk(2, -1)[1].sin()],
    "sizes of parts": [lambda h, n: h.split([4, 8], -1)[1], lambda h, n: h.split([8, 4], -1)[1]],
    "window": [lambda h, n: h[:, -3:], lambda h, n: h[:, -2:]],
    "position": [lambda h, n: h[..., 1], lambda h, n: h[..., -1]],
    "shape": [
        lambda h, n: h.view(*h.shape[:2], 3, 4).sum(-1),
        lambda h, n: h.view(*h.shape[:2], 4, 3).sum(-1),
    ],
    "size": [lambda h, n: h * h.shape[0], lambda h, n: h * h.shape[1]],
    "number of data": [lambda h, n: _scaled(h, n[0], n[1], 0), lambda h, n: _scaled(h, n[0], n[1], 1)],
    "guard": [lambda h, n: h if h.shape[1] < 20 else h.sin(), lambda h, n: h if h.shape[1] < 19 else h.sin()],
    "new values": [lambda h, n: h + torch.ones(12), lambda h, n: h + torch.zeros(12)],
}


@pytest.mark.parametrize("what", UNLIKE)
def test_programs_that_differ_in_one_thing_are_told_apart(what: str) -> None:
    made = [
        finish(capture(Computing(of).eval(), (torch.randn(2, 6, 8), torch.tensor([3, 4, 5]))))
        for of in (*UNLIKE[what], UNLIKE[what][0])
    ]

    assert first_difference(made[0], made[2]) is None
    assert first_difference(made[0], made[1]) is not None
    assert first_difference(made[1], made[0]) is not None
