"""Tokens picked at run time, by masks and by indices, and one of every few channels: what is picked beside
channels leaves them free, and channels of which one is picked go together.

The oracle zeroes columns of the consumer in a copy of the dense model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from invariants import invariants_of
from torch import Tensor, nn

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

Form = Callable[[Tensor, Tensor], Tensor]


def _pairs(h: Tensor) -> tuple[Tensor, Tensor]:
    first, second = h.unflatten(-1, (6, 2)).unbind(-1)
    return first, second


def _order(x: Tensor) -> Tensor:
    return x[..., :1].argsort(1)


#: form, and how wide what it gives is
FREE: dict[str, tuple[Form, int]] = {
    "tokens by a mask": (lambda h, x: h[x[..., 0] > 0], 12),
    "samples by a mask": (lambda h, x: h[x[:, 0, 0] > -9], 12),
    "tokens by a mask of their own": (lambda h, x: h[:, x[0, :, 0] > -9], 12),
    "gathered": (lambda h, x: h.gather(1, _order(x).expand(-1, -1, 12)), 12),
    "taken along": (lambda h, x: torch.take_along_dim(h, _order(x), dim=1), 12),
    "largest token": (lambda h, x: h.gather(1, x[..., :1].argmax(1, keepdim=True).expand(-1, -1, 12)), 12),
    "pairs by select": (
        lambda h, _: h.view(*h.shape[:2], 6, 2)[..., 0] * h.view(*h.shape[:2], 6, 2)[..., 1],
        6,
    ),
    "pairs by unbind": (lambda h, _: torch.stack(_pairs(h)[::-1], -1).flatten(-2) + h, 12),
    "first of every four": (lambda h, _: h.unflatten(-1, (3, 4))[..., 0], 3),
}


class Net(nn.Module):
    def __init__(self, form: Form, width: int) -> None:
        super().__init__()
        self.up, self.down, self.form = nn.Linear(5, 12), nn.Linear(width, 3), form

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.form(self.up(x), x))


def _input(batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, tokens, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", FREE)
def test_channels_beside_are_free(name: str) -> None:
    torch.manual_seed(0)
    model = Net(*FREE[name]).double().eval()
    result = fasp_fx.prune(model, (_input(2, 4),), sparsity=0.34, score="random", restore=None)
    assert result.report.sparsity > 0.2
    dense = copy.deepcopy(model)
    for part in (part for group in result.plan.groups for part in group.consumers):
        gone = torch.tensor([index for block in part.by_block() for index in block])
        dense.get_parameter(part.name).data.index_fill_(part.dim, gone, 0)
    # The exporter fixes sizes that it finds broadcast.
    for sizes in ((2, 4), (2, 4) if name == "taken along" else (3, 7)):
        x = _input(*sizes)
        torch.testing.assert_close(result.module(x), dense(x))


@pytest.mark.parametrize(
    "form",
    [
        lambda h, x: h[..., x.mean((0, 1)).repeat(3)[:12] > -9],
        lambda h, x: h.gather(-1, h.argsort(-1)),
        lambda h, x: h.gather(1, _order(x).expand(-1, -1, 12)[..., :11]),
        lambda h, x: h[(h > -9).all(0).all(0).expand(*h.shape[:2], 12)].view(*h.shape),
    ],
    ids=["channels by a mask", "channels in order", "not all channels", "a mask of everything"],
)
def test_channels_that_are_picked_stay(form: Form) -> None:
    model, x = (
        Net(form, form(torch.zeros(2, 4, 12), torch.zeros(2, 4, 5)).shape[-1]).eval(),
        _input(2, 4).float(),
    )
    (group, *others) = (
        group
        for group in fasp_fx.analyze(model, (x,)).groups
        if group.producers[:1] and group.producers[0].name == "up.weight"
    )
    assert not others
    assert group.status in ("frozen", "approximate")


def test_queries_keys_and_values_side_by_side() -> None:
    """Of a fused weight whose rows are a query, a key and a value in turn the three of a channel go together,
    as queries and keys do where they are asked for.
    """

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fused, self.out = nn.Linear(6, 36), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.fused(x).view(*x.shape[:2], 3, 4, 3).transpose(1, 2)
            found = nn.functional.scaled_dot_product_attention(*heads.unbind(-1), scale=0.5)
            return self.out(found.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = Attention().double().eval()
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(2, size, 6, generator=generator, dtype=torch.float64) for size in (5, 8))
    groups = [group for group in fasp_fx.analyze(model, (x,)).groups if group.size == 12]
    assert [group.status for group in groups] == ["exempt"]
    options: dict[str, Any] = {"score": "random", "restore": None, "include": ("exempt",)}
    result = fasp_fx.prune(model, (x,), sparsity=0.3, **options)
    (planned,) = result.plan.groups
    dense = copy.deepcopy(model)
    for part in (*planned.producers, *planned.consumers):
        gone = torch.tensor(sorted(index for block in part.by_block() for index in block))
        dense.get_parameter(part.name).data.index_fill_(part.dim, gone, 0)
    assert len(planned.producers[0].by_block()[0]) % 3 == 0
    for data in (x, other):
        torch.testing.assert_close(result.module(data), dense(data))


COMPLEX: dict[str, Callable[[Tensor], Tensor]] = {
    "pairs as complex numbers": lambda h: torch.view_as_real(_complex(h) * 1j).flatten(-2),
    "lengths of pairs": lambda h: _complex(h).abs().repeat(1, 1, 2),
    "mixed over tokens": lambda h: torch.fft.fft(h, dim=1).real,
    "filtered over tokens": lambda h: torch.fft.irfft(torch.fft.rfft(h, dim=1) * 0.5, n=h.shape[1], dim=1),
}


def _complex(h: Tensor) -> Tensor:
    return torch.view_as_complex(h.unflatten(-1, (6, 2)))


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers(name: str) -> None:
    torch.manual_seed(0)
    model, x = Net(lambda h, _: COMPLEX[name](h), 12).eval(), _input(2, 4).float()
    assert fasp_fx.analyze(model, (x,)).select("prunable")
    wanted = invariants_of(name, COMPLEX)
    fasp_fx.testing.check_program(model, (x,), invariants=wanted)


class Masked(nn.Module):
    """A mask of two dimensions, of which the second are the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("mask", torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) > 0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.last(hidden) + hidden.permute(1, 2, 0)[self.mask].sum(0)[:, None, None]


def test_a_mask_speaks_of_as_many_dimensions_as_it_has() -> None:
    analysis = fasp_fx.analyze(Masked().eval(), (torch.randn(2, 4, 5),))
    group = next(
        group for group in analysis.groups if "last.weight" in {part.name for part in group.consumers}
    )
    assert "aten.index.Tensor names positions along this dimension one by one" in group.reason
