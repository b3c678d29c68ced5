"""Layouts: small tricky modules with the groups that a person expects of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from models import made, wide
from oracle import assert_mask_exact
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import randomise

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

Side = dict[str, list[int] | None]


class Case(NamedTuple):
    """A module from 6 features to 6, and for each prunable group its producers, its consumers (with indices
    where they are not whole) and its blocks; ``reason``: why ``up.bias`` stays.
    """

    forward: Callable[..., Any]
    groups: list[tuple[Side, Side, int]]
    held: Callable[[], dict[str, Any]] = dict
    reason: str | None = None


def linear(name: str, rows: list[int] | None = None) -> Side:
    return {f"{name}.weight": rows, f"{name}.bias": rows}


def layers(**sizes: tuple[int, int]) -> Callable[[], dict[str, Any]]:
    return lambda: {name: nn.Linear(*size) for name, size in sizes.items()}


def ones(*shape: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"scale": nn.Parameter(torch.ones(*shape))}


def _parted(self: Any, x: Tensor) -> Tensor:
    first, second = self.up(x).split([3, 5], -1)
    return self.left(first) + self.right(second.sigmoid())


def _gated(self: Any, x: Tensor) -> Tensor:
    gate, up = self.up(x).chunk(2, -1)
    return self.short(F.silu(gate) * up)


def _interleaved(self: Any, x: Tensor) -> Tensor:
    both = self.fused(x)
    return self.short(torch.sigmoid(both[:, 2:11:2]) * both[:, 3:13:2])


def _residual(self: Any, x: Tensor) -> Tensor:
    h = self.up(x)
    return self.down(h + self.inner_down(self.inner_up(h).relu()))


def _stacked(self: Any, x: Tensor) -> Tensor:
    first, second = torch.stack([self.up(x), self.other(x).tanh()]).unbind(0)
    return self.down(first * second)


UP = linear("up")
WHOLE: list[tuple[Side, Side, int]] = [(UP, {"down.weight": None}, 1)]
SHORT: list[tuple[Side, Side, int]] = [(UP, {"short.weight": None}, 1)]
WIDE: list[tuple[Side, Side, int]] = [(UP, {"wide.weight": None}, 1)]
CASES: dict[str, Case] = {
    "concatenation": Case(
        lambda self, x: self.down(torch.cat([self.left(x).tanh(), self.right(x)], -1)),
        [
            (linear("left"), {"down.weight": [0, 1, 2]}, 1),
            (linear("right"), {"down.weight": [3, 4, 5, 6, 7]}, 1),
        ],
        layers(left=(6, 3), right=(6, 5)),
    ),
    "split": Case(
        _parted,
        [
            (linear("up", [0, 1, 2]), {"left.weight": None}, 1),
            (linear("up", [3, 4, 5, 6, 7]), {"right.weight": None}, 1),
        ],
        layers(left=(3, 6), right=(5, 6)),
    ),
    # gate and up in one weight: neuron i is rows i and i + 4
    "gated halves": Case(_gated, SHORT, layers(short=(4, 6))),
    # each channel feeds two columns
    "repeated": Case(lambda self, x: self.wide(self.up(x).repeat(1, 2)), WIDE, layers(wide=(16, 6))),
    "repeated one by one": Case(
        lambda self, x: self.wide(self.up(x).repeat_interleave(2, -1)), WIDE, layers(wide=(16, 6))
    ),
    # the border is no channel: its columns stay
    "padded": Case(
        lambda self, x: self.wide(F.pad(self.up(x), (1, 2), value=0.5)),
        [(UP, {"wide.weight": list(range(1, 9))}, 1)],
        layers(wide=(11, 6)),
    ),
    "cropped": Case(
        lambda self, x: self.short(F.pad(self.up(x), (-1, 0))), [], layers(short=(7, 6)), "border"
    ),
    "reflected": Case(
        lambda self, x: self.wide(F.pad(self.up(x)[:, None], (1, 2), mode="reflect")[:, 0]),
        [],
        layers(wide=(11, 6)),
        "border",
    ),
    # a border of another dimension leaves the channels alone
    "padded beside": Case(lambda self, x: self.down(F.pad(self.up(x)[:, None], (0, 0, 1, 1)).relu()), WHOLE),
    "flipped": Case(lambda self, x: self.down(self.up(x).flip(-1)), WHOLE),
    # runs of as many neighbours as the step go as a whole, those that nothing reads among them
    "steps": Case(lambda self, x: self.short(self.up(x)[:, ::2]), SHORT, layers(short=(4, 6))),
    # gate and up as even and odd rows of one weight, some of them left out: each pair goes as a whole
    "interleaved": Case(
        _interleaved,
        [(linear("fused", list(range(2, 12))), {"short.weight": None}, 1)],
        layers(fused=(6, 14), short=(5, 6)),
    ),
    # every third column of two rows of six: equal numbers of runs of three in each row
    "steps in heads": Case(
        lambda self, x: self.short(self.wide(x).unflatten(-1, (2, 6))[:, :, 1::3].flatten(1).relu()),
        [(linear("wide"), {"short.weight": None}, 2)],
        layers(wide=(6, 12), short=(4, 6)),
    ),
    # the rows that nothing reads stay
    "slice": Case(
        lambda self, x: self.short(self.up(x)[:, 2:-1]),
        [(linear("up", [2, 3, 4, 5, 6]), {"short.weight": None}, 1)],
        layers(short=(5, 6)),
    ),
    "two consumers": Case(
        lambda self, x: self.down(h := self.up(x).relu()) * self.other(h),
        [(UP, {"down.weight": None, "other.weight": None}, 1)],
        layers(other=(8, 6)),
    ),
    # one consumer reads all channels, one the first half: two groups, for their consumers differ
    "overlapping consumers": Case(
        lambda self, x: self.down(h := self.up(x).relu()) + self.short(h[:, :4]),
        [
            (linear("up", [0, 1, 2, 3]), {"down.weight": [0, 1, 2, 3], "short.weight": None}, 1),
            (linear("up", [4, 5, 6, 7]), {"down.weight": [4, 5, 6, 7]}, 1),
        ],
        layers(short=(4, 6)),
    ),
    "used twice": Case(
        lambda self, x: self.down(self.up(x).relu()) + self.down(self.up(x * 2).tanh()), WHOLE
    ),
    # a skip connection couples three weights; the inner feed-forward is a group of its own
    "residual": Case(
        _residual,
        [
            ({**UP, **linear("inner_down")}, {"inner_up.weight": None, "down.weight": None}, 1),
            (linear("inner_up"), {"inner_down.weight": None}, 1),
        ],
        layers(inner_up=(8, 5), inner_down=(5, 8)),
    ),
    "a factor for each channel": Case(
        lambda self, x: self.down(self.up(x) * self.scale),
        [({**UP, "scale": None}, {"down.weight": None}, 1)],
        ones(8),
    ),
    # the heads stay, each loses as many channels
    "a factor for each head": Case(
        lambda self, x: self.down((self.up(x).view(-1, 4, 2) * self.scale).flatten(1)),
        [(UP, {"down.weight": None}, 4)],
        ones(4, 1),
    ),
    # channel i of all heads goes together
    "factors shared by heads": Case(
        lambda self, x: self.down((self.up(x).view(-1, 4, 2) * self.scale).flatten(1)),
        [({**UP, "scale": None}, {"down.weight": None}, 1)],
        ones(2),
    ),
    "a sum over heads": Case(
        lambda self, x: self.short(self.up(x).view(-1, 4, 2).sum(1)), SHORT, layers(short=(2, 6))
    ),
    # two groups of four are dealt out in turn, so that both lose the same places
    "shuffled": Case(lambda self, x: self.down(self.up(x).view(-1, 2, 4).transpose(1, 2).flatten(1)), WHOLE),
    # two branches stacked and taken apart again
    "stacked": Case(_stacked, [({**UP, **linear("other")}, {"down.weight": None}, 1)], layers(other=(6, 8))),
    # positions named one by one stay
    "fixed indices": Case(
        lambda self, x: self.down(self.up(x)[:, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])]),
        [],
        reason="one by one",
    ),
    # a norm over the hidden channels mixes them: pruning them would not be exact
    "normalised": Case(
        lambda self, x: self.down(self.norm(self.up(x))), [], lambda: {"norm": nn.LayerNorm(8)}, "mixed"
    ),
    "reaches the output": Case(lambda self, x: (self.down(h := self.up(x)), h), [], reason="output"),
    # a single channel would be the whole of its dimension
    "one channel": Case(
        lambda self, x: self.down(self.up(x).relu()) + self.wide(self.narrow(x).relu()),
        WHOLE,
        layers(narrow=(6, 1), wide=(1, 6)),
    ),
}


def build(case: Case) -> nn.Module:
    return randomise(wide(case.forward, hidden=8, **case.held()), std=0.5)


def described(analysis: fasp_fx.Analysis) -> list[tuple[Side, Side, int]]:
    def side(members: tuple[fasp_fx.analysis.Member, ...]) -> Side:
        return {m.name: None if len(m.indices) == m.size else list(m.indices) for m in members}

    return [(side(g.producers), side(g.consumers), g.blocks) for g in analysis.select("prunable")]


def whole(expected: list[tuple[Side, Side, int]], model: nn.Module) -> list[object]:
    """Indices that happen to be all there are written as ``None``."""
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return [
        (
            {n: None if i is None or len(i) == sizes[n][0] else i for n, i in left.items()},
            {n: None if i is None or len(i) == sizes[n][-1] else i for n, i in right.items()},
            b,
        )
        for left, right, b in expected
    ]


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CASES)
def test_expected_groups(name: str) -> None:
    case, x = CASES[name], seeded(0, 4, 6)
    model = build(case)
    analysis = fasp_fx.analyze(model, (x,))
    found, expected = described(analysis), whole(case.groups, model)
    assert len(found) == len(expected)
    assert all(group in found for group in expected), f"found {found}"
    if case.reason is not None:
        left = [group for group in analysis.groups if group.status != "prunable"]
        assert any(case.reason in g.reason for g in left if any(m.name == "up.bias" for m in g.producers))
    if not expected:
        with pytest.raises(fasp_fx.NothingPrunableError):
            fasp_fx.prune(model, (x,), score="random", restore=None)
        return
    for share in (0.6, 1.0):
        sparsity = share * analysis.max_sparsity
        result = fasp_fx.prune(model, (x,), sparsity=sparsity, score="random", restore=None)
        assert result.plan.groups
        assert_mask_exact(model, result, lambda called: called(seeded(1, 7, 6)))


def _mixes(self: Any, x: Tensor) -> Tensor:
    """One block of an MLP-Mixer: across tokens, then across channels."""
    x = x + self.token_down(F.gelu(self.token_up(self.norm(x).transpose(1, 2)))).transpose(1, 2)
    x = x + self.channel_down(F.gelu(self.channel_up(x)))
    return self.head(x.mean(1))


def _mixes_patches(self: Any, x: Tensor) -> Tensor:
    """Embedding channels are made by a weight of the model, and so are mixed tokens: position (c, o) belongs
    to both.
    """
    h = self.mix(self.embed(x).transpose(1, 2)).relu()  # [batch, 6 channels, 7 mixed tokens]
    return self.out(self.head(h.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize(
    ("forward", "held", "shape", "groups"),
    [
        (
            _mixes,
            layers(token_up=(5, 7), token_down=(7, 5), channel_up=(6, 9), channel_down=(9, 6), head=(6, 3)),
            (5, 6),
            [("token_up", "token_down"), ("channel_up", "channel_down")],
        ),
        (
            _mixes_patches,
            layers(embed=(4, 6), mix=(5, 7), head=(6, 3), out=(7, 2)),
            (5, 4),
            [("embed", "head"), ("mix", "out")],
        ),
    ],
    ids=["tokens", "patches"],
)
def test_mixing_of_positions(
    forward: Any, held: Any, shape: tuple[int, int], groups: list[tuple[str, str]]
) -> None:
    model = randomise(made(forward, norm=nn.LayerNorm(6), **held()), std=0.5)
    x, unseen = seeded(0, 2, *shape), seeded(1, 3, *shape)
    analysis = fasp_fx.analyze(model, (x,))
    assert described(analysis) == [(linear(one), {f"{other}.weight": None}, 1) for one, other in groups]
    for sparsity in (0.3, analysis.max_sparsity):
        result = fasp_fx.prune(model, (x,), sparsity=sparsity, score="random", restore=None)
        assert_mask_exact(model, result, lambda called: called(unseen))
