"""What lies where must hold at every size: reshapes that mix a dimension that varies from call to call with
channels, and cuts by a size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import made, parameter
from oracle import assert_exact
from randomly import Between, hold, inputs, sets_of
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "heads without the transpose": lambda h: h.reshape(h.shape[0], 3, -1, 4).transpose(1, 2).reshape(h.shape),
    "transposed and read as it was": lambda h: h.transpose(1, 2).reshape(h.shape),
    "time in the place of the batch": lambda h: h.transpose(0, 2).reshape(h.shape),
    "channels in the place of time": (
        lambda h: F.conv1d(h.view(h.shape[0], 12, -1), torch.ones(12, 1, 1).double(), groups=12).view(h.shape)
    ),
    "halves of a flattened sequence": lambda h: torch.cat(h.flatten(1).chunk(2, 1)[::-1], 1).view(h.shape),
    "the end of a flattened sequence": lambda h: h.flatten(1)[:, -12:].unsqueeze(1) + h,
    "the last of a flattened sequence": lambda h: h.flatten(1)[:, -1][:, None, None] + h,
    "the channel that the length says": lambda h: h * h[..., h.shape[1] - 1].unsqueeze(-1),
    "behind as many zeros as there are steps": lambda h: F.pad(h, (h.shape[1], 0))[..., :12],
    "as many channels as there are steps": lambda h: F.pad(h[..., : h.shape[1]], (0, 12))[..., :12],
    "as many heads as there are steps": (
        lambda h: h + h.unflatten(-1, (6, 2))[:, :, : h.shape[1], :].sum(-2).repeat(1, 1, 6)
    ),
    "the one of a pair that data picks": (
        lambda h: h * h.unflatten(-1, (6, 2))[..., (h.sum() > 0).long()].repeat(1, 1, 2)
    ),
    "repeated by the length, read crosswise": (
        lambda h: h.repeat(1, 1, h.shape[1]).view(*h.shape[:2], 12, h.shape[1]).sum(3)
    ),
}

FREE: dict[str, Callable[[Tensor], Tensor]] = {
    "flattened and back": lambda h: F.relu(h.flatten(1)).view(h.shape),
    "flattened, turned and back": lambda h: h.flatten(1).flip(1).view(h.shape),
    "flattened behind its channels": (
        lambda h: F.relu(h.transpose(1, 2).flatten(1)).view(h.shape[0], 12, -1).transpose(1, 2)
    ),
    "rows of a product of sizes": lambda h: h.reshape(-1, h.shape[1] * h.shape[2]).view(h.shape),
    "tokens of all sequences": lambda h: F.relu(h.reshape(-1, 12)).view(h.shape),
    "repeated by the length": lambda h: h.repeat(1, 1, h.shape[1]).view(*h.shape[:2], h.shape[1], 12).sum(2),
    "halves in time": lambda h: torch.cat([h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :] * 2], 1),
    "twice in time": lambda h: torch.stack([h, h * 2], 2).flatten(1, 2)[:, : h.shape[1]],
    "pairs in time behind channels": (
        lambda h: (
            F.pad(h, (0, 0, 0, h.shape[1]))
            .transpose(1, 2)
            .view(-1, 12, h.shape[1], 2)
            .flip(3)
            .flatten(2)
            .transpose(1, 2)
        )
    ),
    "pairs in time, divided": (
        lambda h: F.pad(h, (0, 0, 0, h.shape[1])).transpose(1, 2).unflatten(2, (-1, 2)).sum(3).transpose(1, 2)
    ),
    "repeated to a given length": (
        lambda h: h.repeat_interleave(2, -1, output_size=24).unflatten(-1, (12, 2)).sum(-1)
    ),
}


#: what torch exports only from a release on
SINCE = {"the one of a pair that data picks": "2.13"}


@pytest.mark.parametrize("name", EXACT)
def test_exact_at_other_sizes_than_the_example(name: str) -> None:
    if torch.__version__ < SINCE.get(name, "2"):
        pytest.skip(f"torch {torch.__version__} does not export this")
    analysis = hold(Between(EXACT[name]), inputs())
    assert ("prunable", 16, 1) in sets_of(analysis, "third.weight"), (
        "what follows is pruned whatever becomes of the channels"
    )


@pytest.mark.parametrize("name", FREE)
def test_reshapes_that_hold_at_every_size_leave_channels_free(name: str) -> None:
    analysis = hold(Between(FREE[name]), inputs())
    assert sets_of(analysis, "first.weight") == [("prunable", 12, 1)]


def _crosswise(h: Tensor) -> Tensor:
    time = h.shape[1]
    turned = h.view(h.shape[0], time, 3, 4).view(h.shape[0], 3, time, 4).transpose(1, 2)
    return F.relu(turned).reshape(h.shape[0], time, 12)


def _beside(m: Any, x: Tensor) -> Tensor:
    return m.last(F.relu(m.second(torch.cat([x, F.relu(m.first(x))], -1))))


def _looked_up(m: Any, x: Tensor) -> Tensor:
    """Channels in an order that a table gives for each length."""
    hidden = F.relu(m.first(x))
    return m.last(F.relu(m.second(hidden + hidden[..., m.orders[x.shape[1] - 1]])))


def layered(forward: Callable[..., Any], width: int, **held: Any) -> nn.Module:
    layers = {"first": nn.Linear(8, 12), "second": nn.Linear(width, 5), "last": nn.Linear(5, 4)}
    return made(forward, **layers, **held)


ORDERS = torch.stack(
    [torch.randperm(12, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Between(_crosswise), ("prunable", 4, 1)),
        (lambda: layered(_beside, 20), ("prunable", 12, 1)),
        (lambda: layered(_looked_up, 12, orders=ORDERS), ("frozen", 12, 1)),
    ],
    ids=["blocks that a size deals out", "an input beside channels", "indices that a size picks"],
)
def test_channels_beside_sizes(make: Callable[[], nn.Module], expected: tuple[str, int, int]) -> None:
    assert sets_of(hold(make(), inputs()), "first.weight") == [expected]


@pytest.mark.parametrize(
    "merge",
    [
        lambda h: h.view(h.shape[0], 24, h.shape[2] // 2, 2).permute(0, 1, 3, 2).flatten(1, 2),
        lambda h: h.unflatten(2, (-1, 2)).permute(0, 1, 3, 2).flatten(1, 2),
        lambda h: h.view(h.shape[0], 24, h.shape[2] // 2, 2).permute(0, 3, 1, 2).reshape(h.shape[0], 48, -1),
        lambda h: F.pixel_unshuffle(torch.stack([h, -h], 2), 2)[:, ::2].flatten(2),
    ],
    ids=["view", "unflatten", "parts first", "pixel_unshuffle"],
)
def test_steps_that_are_merged_leave_the_channels_before_them_free(merge: Callable[[Tensor], Tensor]) -> None:
    """Two steps in time become one; how often they fit into the length is no business of the channels'."""
    torch.manual_seed(0)
    layers = {"up": nn.Conv1d(4, 24, 1), "down": nn.Conv1d(48, 3, 1)}
    model = made(lambda m, x: m.down(merge(torch.relu(m.up(x)))), **layers).double()
    x = torch.randn(2, 4, 8).double()
    result = fasp_fx.prune(model, (x,), sparsity=0.3, score="random", restore=None)
    assert_exact(model, result, *((torch.randn(3, 4, size).double(),) for size in (4, 8, 14, 40)))


# --- blocks

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
