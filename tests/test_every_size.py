"""What lies where must hold at every size: reshapes that mix a dimension that varies from call to call with
channels, and cuts by a size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import made
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
