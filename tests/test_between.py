"""What stands between a layer and the next one: expansions, tokens picked at run time, channels taken one of
every few, and dimensions of one position. Channels beside it are free, or stay for a reason.

The oracle zeroes columns of the consumer in a copy of the dense model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from invariants import OF_OPERATORS
from models import made, parameter, wide
from oracle import TOLERANCE, assert_exact, error, zeroed
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import randomise

import fasp_fx
from fasp_fx.testing import check_program

pytestmark = pytest.mark.usefixtures("shared_captures")

#: of hidden channels, the input, a mask over tokens and a parameter of one element
Form = Callable[[Tensor, Tensor, Tensor, nn.Parameter], Tensor]


def _pairs(h: Tensor) -> tuple[Tensor, ...]:
    return h.unflatten(-1, (6, 2)).unbind(-1)


def _order(x: Tensor) -> Tensor:
    return x[..., :1].argsort(1)


def _blocks(h: Tensor) -> Tensor:
    return h.view(*h.shape[:2], 3, 4)


def _average(h: Tensor, x: Tensor, mask: Tensor, one: Tensor) -> Tensor:
    """The mean over tokens that are shown, as encoders of sentences compute it."""
    shown = mask.unsqueeze(-1).expand(h.size()).float().to(h.dtype)
    return (h * shown).sum(1) / torch.clamp(shown.sum(1), min=1e-9)


#: what is repeated over channels is repeated less often once they go, and what is picked leaves them free;
#: with how wide what is given is
FREE: dict[str, tuple[Form, int]] = {
    "a mask": (lambda h, x, mask, _: h * mask.unsqueeze(-1).expand_as(h), 12),
    "filled": (lambda h, x, mask, _: h.masked_fill((mask[..., None] == 0).expand_as(h), 0.0), 12),
    "chosen": (lambda h, x, mask, _: torch.where((mask[..., None] > 0).expand(-1, -1, 12), h, 0.1 * h), 12),
    "a parameter": (lambda h, x, _, one: h * one.expand(1, 12), 12),
    "cast": (lambda h, x, mask, _: h * mask.bool().unsqueeze(-1).expand(h.size()).to(h.dtype), 12),
    "repeated": (lambda h, x, mask, _: h * mask[..., None].repeat(1, 1, 12), 12),
    "repeated in blocks": (
        lambda h, x, mask, _: (_blocks(h) * mask[..., None, None].repeat(1, 1, 3, 4)).flatten(2),
        12,
    ),
    "channels repeated": (lambda h, x, mask, _: h + h.repeat(1, 1, 2)[..., :12] * mask[..., None], 12),
    "in blocks": (
        lambda h, x, mask, _: (_blocks(h) * mask[..., None, None].expand(-1, -1, 3, 4)).flatten(2),
        12,
    ),
    "joined": (
        lambda h, x, mask, _: torch.cat([h, mask.unsqueeze(-1).expand_as(h)], -1)[..., :12],
        12,
    ),
    "averaged": (_average, 12),
    "gathered": (lambda h, x, *_: h.gather(1, _order(x).expand(-1, -1, 12)), 12),
    "taken along": (lambda h, x, *_: torch.take_along_dim(h, _order(x), dim=1), 12),
    "largest token": (
        lambda h, x, *_: h.gather(1, x[..., :1].argmax(1, keepdim=True).expand(-1, -1, 12)),
        12,
    ),
    "pairs by select": (
        lambda h, *_: h.view(*h.shape[:2], 6, 2)[..., 0] * h.view(*h.shape[:2], 6, 2)[..., 1],
        6,
    ),
    "pairs by unbind": (lambda h, *_: torch.stack(_pairs(h)[::-1], -1).flatten(-2) + h, 12),
    "first of every four": (lambda h, *_: h.unflatten(-1, (3, 4))[..., 0], 3),
}
#: what picks channels, or is another at each of them, keeps these
KEPT: dict[str, tuple[Form, int]] = {
    "channels by a mask": (lambda h, x, *_: h[..., x.mean((0, 1)).repeat(3)[:12] > -9], 12),
    "channels in order": (lambda h, *_: h.gather(-1, h.argsort(-1)), 12),
    "not all channels": (lambda h, x, *_: h.gather(1, _order(x).expand(-1, -1, 12)[..., :11]), 11),
    "a mask of everything": (
        lambda h, *_: h[(h > -9).all(0).all(0).expand(*h.shape[:2], 12)].view(*h.shape),
        12,
    ),
    "a running sum": (lambda h, x, mask, _: h + mask.unsqueeze(-1).expand(-1, -1, 12).cumsum(-1), 12),
}


def net(form: Form, width: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return made(
        lambda self, x, mask: self.down(form(self.up(x), x, mask, self.one)),
        up=nn.Linear(5, 12),
        down=nn.Linear(width, 3),
        one=parameter(1, 1),
    ).double()


def inputs(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, tokens, 5, generator=generator, dtype=torch.float64)
    return x, (torch.rand(batch, tokens, generator=generator, dtype=torch.float64) > 0.3).double()


@pytest.mark.parametrize("name", FREE)
def test_channels_beside_are_free(name: str) -> None:
    model = net(*FREE[name])
    result = fasp_fx.prune(model, inputs(2, 4), sparsity=0.34, score="random", restore=None)
    assert result.report.sparsity > 0.2, "the channels are free"
    dense = zeroed(model, result.plan)
    # The exporter fixes sizes that it finds broadcast.
    for sizes in ((2, 4), (2, 4) if name == "taken along" else (3, 7)):
        torch.testing.assert_close(result.module(*inputs(*sizes)), dense(*inputs(*sizes)))


@pytest.mark.parametrize("name", KEPT)
def test_channels_that_are_picked_stay(name: str) -> None:
    groups = fasp_fx.analyze(net(*KEPT[name]), inputs(2, 4)).groups
    (group,) = [g for g in groups if g.producers[:1] and g.producers[0].name == "up.weight"]
    assert group.status in ("frozen", "approximate")


def test_queries_keys_and_values_side_by_side() -> None:
    """Of a fused weight whose rows are a query, a key and a value in turn the three of a channel go together,
    as queries and keys do where they are asked for.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        heads = self.fused(x).view(*x.shape[:2], 3, 4, 3).transpose(1, 2)
        found = F.scaled_dot_product_attention(*heads.unbind(-1), scale=0.5)
        return self.out(found.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = made(forward, fused=nn.Linear(6, 36), out=nn.Linear(12, 6)).double()
    x, other = (torch.randn(2, size, 6, dtype=torch.float64) for size in (5, 8))
    groups = [group for group in fasp_fx.analyze(model, (x,)).groups if group.size == 12]
    assert [group.status for group in groups] == ["exempt"]
    options: dict[str, Any] = {"score": "random", "restore": None, "include": ("exempt",)}
    result = fasp_fx.prune(model, (x,), sparsity=0.3, **options)
    (planned,) = result.plan.groups
    assert len(planned.producers[0].by_block()[0]) % 3 == 0
    assert_exact(model, result, (x,), (other,), producers=True, tolerance=1e-9)


def _complex(h: Tensor) -> Tensor:
    return torch.view_as_complex(h.unflatten(-1, (6, 2)))


COMPLEX: dict[str, Callable[[Tensor], Tensor]] = {
    "pairs as complex numbers": lambda h: torch.view_as_real(_complex(h) * 1j).flatten(-2),
    "lengths of pairs": lambda h: _complex(h).abs().repeat(1, 1, 2),
    "mixed over tokens": lambda h: torch.fft.fft(h, dim=1).real,
    "filtered over tokens": lambda h: torch.fft.irfft(torch.fft.rfft(h, dim=1) * 0.5, n=h.shape[1], dim=1),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers(name: str) -> None:
    torch.manual_seed(0)
    model = wide(lambda self, x: self.down(COMPLEX[name](self.up(x))), size=5, hidden=12)
    x = inputs(2, 4)[0].float()
    assert fasp_fx.analyze(model, (x,)).select("prunable")
    check_program(model, (x,), invariants=OF_OPERATORS)


def test_a_gain_of_heads_is_no_product() -> None:
    """The channels of a head vary along its gain, a buffer."""
    model = wide(
        lambda self, x: self.down((self.up(x).unflatten(-1, (3, 4)) * self.gain[:, None]).tanh().flatten(-2)),
        hidden=12,
        gain=torch.linspace(0.5, 1.5, 3),
    )
    model, x = randomise(model), torch.randn(7, 6)
    result = fasp_fx.prune(model, (x,), sparsity=0.4, score="magnitude", restore=None)
    assert error(result.module(x), zeroed(model, result.plan)(x)) < TOLERANCE


# --- dimensions of one position look like dimensions without channels


def appended(last: bool) -> nn.Module:
    """A single channel is appended to others, and all of them are added to channels of another producer."""

    def forward(self: Any, x: Tensor) -> Tensor:
        said = self.say(x).tanh()
        longer, more = torch.cat([said, self.one(said)], -1), self.more(x)
        return self.out((more + longer if last else longer + more).tanh())

    sizes = {"say": (4, 6), "one": (6, 1), "more": (4, 7), "out": (7, 3)}
    return made(forward, **{name: nn.Linear(*size) for name, size in sizes.items()}).double()


def experts(width: int) -> nn.Module:
    """Three experts, all of them asked, each of which reads ``width`` channels."""
    return made(
        lambda self, x: self.out(
            torch.bmm(torch.bmm(self.into(x).expand(3, -1, -1), self.up).tanh(), self.down).sum(0)
        ),
        into=nn.Linear(5, width),
        out=nn.Linear(4, 3),
        up=parameter(3, width, 8),
        down=parameter(3, 8, 4),
    ).double()


@pytest.mark.parametrize("last", [False, True])
def test_a_position_without_channel_hides_no_channel_that_it_is_added_to(last: bool) -> None:
    torch.manual_seed(0)
    model, x = appended(last), torch.randn(2, 4, dtype=torch.float64)
    analysis = fasp_fx.analyze(model, (x,))
    (kept,) = [group for group in analysis.groups if "not a channel" in (group.reason or "")]
    members = [str(member) for member in (*kept.producers, *kept.consumers)]
    assert members == ["more.weight[0] 6", "more.bias[0] 6", "out.weight[1] 6"]
    assert any(group.status == "prunable" and group.size == 6 for group in analysis.groups)
    for sparsity in (None, analysis.max_sparsity):  # until one is left beside the appended one
        check_program(model, (x,), sparsity=sparsity, invariants=("mask-exact", "steps"))


def test_experts_that_read_one_channel_have_neurons_of_their_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64)
    for model in (experts(1), experts(2)):
        groups = fasp_fx.analyze(model, (x,)).groups
        assert any("3 x 8  up[2 x 3] -> down[1 x 3]" in str(group) for group in groups)
    for seed in (1, 2):  # a plan made before they read one channel goes on after
        check_program(model, (x,), seed=seed, invariants=("mask-exact", "steps"))


def test_the_last_channel_of_the_only_matrix_left_proves_nothing() -> None:
    """Two matrices stored side by side are contracted with what depends on the input, and added to two
    others.
    """
    torch.manual_seed(0)
    model = made(
        lambda self, x: (
            torch.baddbmm(self.add, self.first.view(2, 2, 2), self.second + x).transpose(0, -1) @ self.out
        ),
        add=parameter(2, 2, 2),
        out=parameter(2, 2),
        first=parameter(2, 4),
        second=parameter(2, 2, 2),
    ).double()
    x = torch.randn((), dtype=torch.float64)
    most = fasp_fx.analyze(model, (x,)).max_sparsity
    for seed in range(4):
        verdict = check_program(model, (x,), seed=seed, sparsity=most, invariants=("mask-exact",))
        assert verdict.removed == 2
