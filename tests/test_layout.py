"""Layouts: the blocks that keep tensors boxes, and small tricky modules with the groups that a person expects
of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from oracle import TOLERANCE, assert_mask_exact, error, zeroed
from torch import Tensor, nn
from torch.fx import Graph
from torch.nn import functional as F
from zoo import randomise

import fasp_fx
from fasp_fx.analysis.build._layout import find_blocks

pytestmark = pytest.mark.usefixtures("shared_captures")

NODE = Graph().placeholder("x")


def blocks_of(rows: list[list[int]], group_of: list[int]) -> tuple[list[int], list[list[int]]]:
    """The blocks for one box whose numbers are channel sets, counted from 0, and the sets in conflict."""
    block, conflicts = find_blocks([(np.array(rows), NODE)], np.arange(len(group_of)), np.array(group_of))
    _, renamed = np.unique(block, return_inverse=True)
    return renamed.tolist(), [np.unique(conflict.classes).tolist() for conflict in conflicts]


def test_rows_become_blocks() -> None:
    block, conflicts = blocks_of([[0, 1], [2, 3]], [0, 0, 0, 0])
    assert block[0] == block[1] != block[2] == block[3]
    assert not conflicts


def test_a_channel_in_all_rows_is_one_block() -> None:
    block, conflicts = blocks_of([[0, 1], [0, 1]], [0, 0])
    assert block == [0, 0]
    assert not conflicts


def test_repeated_heads() -> None:
    block, conflicts = blocks_of([[0, 1], [0, 1], [2, 3], [2, 3]], [0, 0, 0, 0])
    assert block[0] == block[1] != block[2] == block[3]
    assert not conflicts


def test_a_row_that_holds_other_channels_is_a_conflict() -> None:
    """As [heads, 3, d] viewed as rows: only the third row of each head may lose channels."""
    _, conflicts = blocks_of([[0, 1], [2, 3], [4, 5]], [-1, -1, -1, -1, 0, 0])
    assert conflicts == [[4, 5]]


def test_blocks_of_unequal_size_are_a_conflict() -> None:
    _, conflicts = blocks_of([[0, 1, 2], [3, 4, -1]], [0, 0, 0, 0, 0])
    assert conflicts == [[0, 1, 2, 3, 4]]


def test_two_groups_in_one_row_are_independent() -> None:
    block, conflicts = blocks_of([[0, 1, 2, 3], [4, 5, 6, 7]], [0, 0, 1, 1, 0, 0, 1, 1])
    assert len(set(block)) == 4
    assert not conflicts


def test_a_group_missing_in_one_row_is_a_conflict() -> None:
    _, conflicts = blocks_of([[0, 1], [0, 2]], [0, 1, 2])
    assert [1, 2] in conflicts or conflicts == [[1, 2]]


def test_boxes_of_unrelated_groups_do_not_touch() -> None:
    block, conflicts = find_blocks(
        [(np.array([[0, 1], [2, 3]]), NODE)], np.arange(6), np.array([0, 0, 0, 0, 1, 1])
    )
    assert block[4] == block[5]
    assert block[4] not in block[:4]
    assert not conflicts


def test_what_is_needed_beside_others_is_a_block() -> None:
    needed = [np.array([0, 1]), np.arange(6)]
    block, conflicts = find_blocks([], np.arange(6), np.array([0, 0, 0, 0, 1, 1]), needed)
    assert block[0] == block[1] != block[2] == block[3]
    assert block[4] == block[5]
    assert not conflicts


# --- modules


@dataclass(frozen=True)
class Expected:
    """``prunable``: for each group its producers, its consumers (with indices where they are not whole) and
    its blocks.
    """

    prunable: list[tuple[dict[str, list[int] | None], dict[str, list[int] | None], int]]
    reasons: dict[str, str] = field(default_factory=dict)


class Base(nn.Module):
    """A module from 6 features to 6; ``up`` has 8 channels and ``down`` consumes them."""

    width, hidden, expected = 6, 8, Expected([])

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(self.width, self.hidden), nn.Linear(self.hidden, self.width)
        self.extra()

    def extra(self) -> None:
        """More parameters."""

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


UP = {"up.weight": None, "up.bias": None}


def linear(name: str, rows: list[int] | None = None) -> dict[str, list[int] | None]:
    return {f"{name}.weight": rows, f"{name}.bias": rows}


class Concatenation(Base):
    expected = Expected(
        [
            (linear("left"), {"down.weight": [0, 1, 2]}, 1),
            (linear("right"), {"down.weight": [3, 4, 5, 6, 7]}, 1),
        ]
    )

    def extra(self) -> None:
        del self.up
        self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.cat([self.left(x).tanh(), self.right(x)], -1))


class Split(Base):
    expected = Expected(
        [
            (linear("up", [0, 1, 2]), {"left.weight": None}, 1),
            (linear("up", [3, 4, 5, 6, 7]), {"right.weight": None}, 1),
        ]
    )

    def extra(self) -> None:
        del self.down
        self.left, self.right = nn.Linear(3, 6), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.up(x).split([3, 5], -1)
        return self.left(first) + self.right(second.sigmoid())


class GatedHalves(Base):
    """Gate and up in one weight: neuron i is rows i and i + 4."""

    expected = Expected([(linear("up", list(range(8))), {"short.weight": None}, 1)])

    def extra(self) -> None:
        del self.down
        self.short = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.short(F.silu(gate) * up)


class Repeat(Base):
    """Each channel feeds two columns."""

    expected = Expected([(UP, {"wide.weight": None}, 1)])

    def extra(self) -> None:
        del self.down
        self.wide = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.up(x).repeat(1, 2))


class RepeatInterleave(Repeat):
    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.up(x).repeat_interleave(2, -1))


class Pad(Base):
    """The border is no channel: its columns stay."""

    expected = Expected([(UP, {"wide.weight": list(range(1, 9))}, 1)])

    def extra(self) -> None:
        del self.down
        self.wide = nn.Linear(11, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(F.pad(self.up(x), (1, 2), value=0.5))


class Crop(Base):
    """A negative border cuts off a channel by its place."""

    expected = Expected([], {"up.bias": "border"})

    def extra(self) -> None:
        del self.down
        self.short = nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(F.pad(self.up(x), (-1, 0)))


class Reflect(Base):
    """The border repeats channels by their place."""

    expected = Expected([], {"up.bias": "border"})

    def extra(self) -> None:
        del self.down
        self.wide = nn.Linear(11, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(F.pad(self.up(x)[:, None], (1, 2), mode="reflect")[:, 0])


class PadHeads(Base):
    """A border of another dimension leaves the channels alone."""

    expected = Expected([(UP, {"down.weight": None}, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.pad(self.up(x)[:, None], (0, 0, 1, 1)).relu())


class Flip(Base):
    expected = Expected([(UP, {"down.weight": None}, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).flip(-1))


class Step(Base):
    """Runs of as many neighbours as the step go as a whole, those that nothing reads among them."""

    expected = Expected([(UP, {"short.weight": None}, 1)])

    def extra(self) -> None:
        del self.down
        self.short = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(self.up(x)[:, ::2])


class Interleaved(Base):
    """Gate and up as even and odd rows of one weight, some of them left out: each pair goes as a whole."""

    expected = Expected([(linear("fused", list(range(2, 12))), {"short.weight": None}, 1)])

    def extra(self) -> None:
        del self.up, self.down
        self.fused = nn.Linear(6, 14)
        self.short = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        both = self.fused(x)
        return self.short(torch.sigmoid(both[:, 2:11:2]) * both[:, 3:13:2])


class StepInHeads(Base):
    """Every third column of two rows of six: equal numbers of runs of three in each row."""

    expected = Expected([(linear("wide", list(range(12))), {"short.weight": None}, 2)])

    def extra(self) -> None:
        del self.up, self.down
        self.wide = nn.Linear(6, 12)
        self.short = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(self.wide(x).unflatten(-1, (2, 6))[:, :, 1::3].flatten(1).relu())


class Slice(Base):
    """The rows that nothing reads stay."""

    expected = Expected([(linear("up", [2, 3, 4, 5, 6]), {"short.weight": None}, 1)])

    def extra(self) -> None:
        del self.down
        self.short = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(self.up(x)[:, 2:-1])


class TwoConsumers(Base):
    expected = Expected([(UP, {"down.weight": None, "other.weight": None}, 1)])

    def extra(self) -> None:
        self.other = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        return self.down(h) * self.other(h)


class OverlappingConsumers(Base):
    """One consumer reads all channels, one the first half: two groups, for their consumers differ."""

    expected = Expected(
        [
            (linear("up", [0, 1, 2, 3]), {"down.weight": [0, 1, 2, 3], "short.weight": None}, 1),
            (linear("up", [4, 5, 6, 7]), {"down.weight": [4, 5, 6, 7]}, 1),
        ]
    )

    def extra(self) -> None:
        self.short = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        return self.down(h) + self.short(h[:, :4])


class UsedTwice(Base):
    expected = Expected([(UP, {"down.weight": None}, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()) + self.down(self.up(x * 2).tanh())


class Residual(Base):
    """A skip connection over the hidden channels couples three weights; the inner feed-forward is a group of
    its own.
    """

    expected = Expected(
        [
            ({**linear("up"), **linear("inner_down")}, {"inner_up.weight": None, "down.weight": None}, 1),
            (linear("inner_up"), {"inner_down.weight": None}, 1),
        ]
    )

    def extra(self) -> None:
        self.inner_up, self.inner_down = nn.Linear(8, 5), nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h + self.inner_down(self.inner_up(h).relu()))


class ChannelScale(Base):
    expected = Expected([({**UP, "scale": None}, {"down.weight": None}, 1)])

    def extra(self) -> None:
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.scale)


class HeadScale(Base):
    """One factor for each of four heads of two channels: the heads stay, each loses as many channels."""

    expected = Expected([(UP, {"down.weight": None}, 4)])

    def extra(self) -> None:
        self.scale = nn.Parameter(torch.ones(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.up(x).view(-1, 4, 2) * self.scale).flatten(1))


class SharedHeadScale(Base):
    """One factor for each channel of a head, shared by four heads: channel i of all heads goes together."""

    expected = Expected([({**UP, "scale": None}, {"down.weight": None}, 1)])

    def extra(self) -> None:
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.up(x).view(-1, 4, 2) * self.scale).flatten(1))


class SumOverHeads(Base):
    """The sum couples channel i of all heads."""

    expected = Expected([(UP, {"short.weight": None}, 1)])

    def extra(self) -> None:
        del self.down
        self.short = nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(self.up(x).view(-1, 4, 2).sum(1))


class Shuffle(Base):
    """Channel shuffle: two groups of four are dealt out in turn, so that both lose the same places."""

    expected = Expected([(UP, {"down.weight": None}, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).view(-1, 2, 4).transpose(1, 2).flatten(1))


class Stack(Base):
    """Two branches stacked and taken apart again."""

    expected = Expected([({**UP, **linear("other")}, {"down.weight": None}, 1)])

    def extra(self) -> None:
        self.other = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.stack([self.up(x), self.other(x).tanh()]).unbind(0)
        return self.down(first * second)


class FixedIndices(Base):
    """Positions named one by one stay."""

    expected = Expected([], {"up.bias": "one by one"})

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)[:, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])])


class Normalised(Base):
    """A norm over the hidden channels mixes them: pruning them would not be exact."""

    expected = Expected([], {"up.bias": "mixed"})

    def extra(self) -> None:
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


class ReachesOutput(Base):
    expected = Expected([], {"up.bias": "output"})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.up(x)
        return self.down(h), h


class OneChannel(Base):
    """A single channel would be the whole of its dimension."""

    expected = Expected([(UP, {"down.weight": None}, 1)])

    def extra(self) -> None:
        self.narrow, self.wide = nn.Linear(6, 1), nn.Linear(1, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()) + self.wide(self.narrow(x).relu())


class Transposed(Base):
    """The consumer's weight lies the other way round."""

    expected = Expected([(UP, {"matrix": None}, 1)])

    def extra(self) -> None:
        self.matrix = nn.Parameter(torch.ones(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).relu() @ self.matrix


MODULES = [
    Concatenation,
    Split,
    GatedHalves,
    Repeat,
    RepeatInterleave,
    Pad,
    Crop,
    Reflect,
    PadHeads,
    Flip,
    Step,
    Interleaved,
    StepInHeads,
    Slice,
    TwoConsumers,
    OverlappingConsumers,
    UsedTwice,
    Residual,
    ChannelScale,
    HeadScale,
    SharedHeadScale,
    SumOverHeads,
    Shuffle,
    Stack,
    FixedIndices,
    Normalised,
    ReachesOutput,
    OneChannel,
    Transposed,
]


def described(
    analysis: fasp_fx.Analysis,
) -> list[tuple[dict[str, list[int] | None], dict[str, list[int] | None], int]]:
    def side(members: tuple[fasp_fx.groups.Member, ...]) -> dict[str, list[int] | None]:
        return {m.name: None if len(m.indices) == m.size else list(m.indices) for m in members}

    return [(side(g.producers), side(g.consumers), g.blocks) for g in analysis.select("prunable")]


def whole(
    expected: list[tuple[dict[str, list[int] | None], dict[str, list[int] | None], int]], model: nn.Module
) -> list[object]:
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


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_expected_groups(kind: type[Base]) -> None:
    model = randomise(kind(), std=0.5)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    analysis = fasp_fx.analyze(model, (x,))
    found, expected = described(analysis), whole(kind.expected.prunable, model)
    assert len(found) == len(expected)
    assert all(group in found for group in expected), f"found {found}"
    for name, reason in kind.expected.reasons.items():
        groups = [
            g for g in analysis.groups if g.status != "prunable" and any(m.name == name for m in g.producers)
        ]
        assert any(any(word in g.reason for word in reason.split("|")) for g in groups), [
            g.reason for g in groups
        ]
    if not expected:
        with pytest.raises(fasp_fx.NothingPrunableError):
            fasp_fx.prune(model, (x,), score="random", restore=None)
        return
    unseen = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    for share in (0.6, 1.0):
        result = fasp_fx.prune(
            model, (x,), sparsity=share * analysis.max_sparsity, score="random", restore=None
        )
        assert result.plan.groups
        if kind is not Transposed:  # the oracle masks inputs of modules, and this consumer is none
            assert_mask_exact(model, result, lambda called: called(unseen))


def test_a_consumer_that_is_no_module() -> None:
    model = randomise(Transposed(), std=0.5)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    result = fasp_fx.prune(model, (x,), sparsity=0.5, score="random", restore=None)
    (group,) = result.plan.groups
    (part,) = group.consumers
    mask = torch.ones(8)
    mask[list(part.removed)] = 0
    with torch.no_grad():
        expected = (model.up(x).relu() * mask) @ model.matrix
        assert float((result.module(x) - expected).abs().max() / expected.abs().max()) < 1e-5
    assert result.module.matrix.shape == (8 - len(part.removed), 6)


class Mixer(nn.Module):
    """One block of an MLP-Mixer: across tokens, then across channels."""

    def __init__(self, tokens: int = 5, channels: int = 6) -> None:
        super().__init__()
        self.token_up, self.token_down = nn.Linear(tokens, 7), nn.Linear(7, tokens)
        self.channel_up, self.channel_down = nn.Linear(channels, 9), nn.Linear(9, channels)
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_down(F.gelu(self.token_up(self.norm(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.channel_down(F.gelu(self.channel_up(x)))
        return self.head(x.mean(1))


def test_token_mixing() -> None:
    model = randomise(Mixer(), std=0.5)
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    analysis = fasp_fx.analyze(model, (x,))
    expected = [
        (linear("token_up"), {"token_down.weight": None}, 1),
        (linear("channel_up"), {"channel_down.weight": None}, 1),
    ]
    assert described(analysis) == expected
    unseen = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))
    for sparsity in (0.3, analysis.max_sparsity):
        result = fasp_fx.prune(model, (x,), sparsity=sparsity, score="random", restore=None)
        assert_mask_exact(model, result, lambda called: called(unseen))


class PatchMixer(nn.Module):
    """Embedding channels are made by a weight of the model, and so are mixed tokens: position (c, o) belongs
    to both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.token_mix, self.head = nn.Linear(4, 6), nn.Linear(5, 7), nn.Linear(6, 3)
        self.out = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token_mix(self.embed(x).transpose(1, 2)).relu()  # [batch, 6 channels, 7 mixed tokens]
        return self.out(self.head(h.transpose(1, 2)).transpose(1, 2))


def test_positions_of_two_axes() -> None:
    model = randomise(PatchMixer(), std=0.5)
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    analysis = fasp_fx.analyze(model, (x,))
    expected = [(linear("embed"), {"head.weight": None}, 1), (linear("token_mix"), {"out.weight": None}, 1)]
    found = described(analysis)
    unseen = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    assert found == expected
    result = fasp_fx.prune(model, (x,), sparsity=0.3, score="random", restore=None)
    assert_mask_exact(model, result, lambda called: called(unseen))


@pytest.mark.parametrize("seed", range(4))
def test_rows_dealt_out_in_turn_lose_the_same_places(seed: int) -> None:
    """Other places in each row would leave them in another order than the columns that read them."""
    model, x = randomise(Shuffle(), seed, std=0.5), torch.randn(4, 6)
    torch.manual_seed(seed)
    result = fasp_fx.prune(model, (x,), sparsity=0.4, score="random", restore=None)
    for part in result.plan.groups[0].producers:
        assert part.removed == tuple(sorted({index % 4 + row for index in part.removed for row in (0, 4)}))
    assert_mask_exact(model, result, lambda module: module(x))


class Parted(nn.Module):
    """Twelve channels, of which two go another way than the rest."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Conv1d(3, 12, 3), nn.Conv1d(12, 3, 1), function

    def forward(self, x: Tensor) -> Tensor:
        few, many = self.first(x).split([2, 10], 1)
        return self.last(torch.cat([self.function(few), many], 1))


def _first_removed(model: nn.Module, x: Tensor) -> tuple[fasp_fx.Result, set[int]]:
    """The model without half of its weights, the first channels before others; and the rows that are gone."""
    result = fasp_fx.prune(
        model,
        (x,),
        calibration=[x],
        sparsity=0.5,
        score=lambda columns: torch.arange(columns.weight.shape[1], dtype=torch.float64),
        restore=None,
    )
    return result, {row for group in result.plan.groups for part in group.producers for row in part.removed}


REFUSE_NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "pool": lambda h: F.max_pool1d(h, 3, 1, 1),
    "resample": lambda h: F.interpolate(h, size=h.shape[-1], mode="linear"),
    "border": lambda h: F.pad(h, (1, 1), mode="reflect")[..., 1:-1],
    "transform": lambda h: torch.fft.irfft(torch.fft.rfft(h, dim=-1), n=h.shape[-1], dim=-1),
    "reshape": lambda h: h.transpose(1, 2).reshape(-1, 2).relu().view(len(h), -1, 2).transpose(1, 2),
}


@pytest.mark.parametrize("function", REFUSE_NOTHING.values(), ids=REFUSE_NOTHING)
def test_something_stays_of_what_an_operator_refuses_to_work_without(
    function: Callable[[Tensor], Tensor],
) -> None:
    model, x = randomise(Parted(function), std=0.5), torch.randn(4, 3, 9)
    result, removed = _first_removed(model, x)
    assert len(removed & {0, 1}) == 1
    assert error(result.module(x), zeroed(model, result.plan)(x)) < TOLERANCE


def test_nothing_is_repeated_as_often_as_it_was() -> None:
    model, x = Parted(lambda h: h.repeat(1, 2, 1)), torch.randn(4, 3, 9)
    model.last = nn.Conv1d(14, 3, 1)
    model = randomise(model, std=0.5)
    result, removed = _first_removed(model, x)
    assert {0, 1} < removed
    assert error(result.module(x), zeroed(model, result.plan)(x)) < TOLERANCE
