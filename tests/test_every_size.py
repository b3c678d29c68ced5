"""What lies where must hold at every size: reshapes that mix a dimension that varies from call to call with
channels, and cuts by a size.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import TOLERANCE, error, zeroed
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


class Patches(nn.Module):
    """Channels in front of time, two steps of which become one."""

    def __init__(self, merge: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.merge = nn.Conv1d(4, 24, 1).double(), nn.Conv1d(48, 3, 1).double(), merge

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.merge(torch.relu(self.up(x))))


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
    """How often two steps fit into the length is no business of the channels'."""
    model, x = Patches(merge).eval(), torch.randn(2, 4, 8).double()
    result = fasp_fx.prune(model, (x,), sparsity=0.3, score="random", restore=None)
    assert result.plan.groups
    assert not [note for note in result.report.notes if "whole" in note]
    for size in (4, 8, 14, 40):
        other = torch.randn(3, 4, size).double()
        with torch.no_grad():
            assert error(result.module(other), zeroed(model, result.plan)(other)) <= TOLERANCE


def test_blocks_that_a_size_deals_out_lose_the_same_channels() -> None:
    def crosswise(h: Tensor) -> Tensor:
        time = h.shape[1]
        return (
            F.relu(h.view(h.shape[0], time, 3, 4).view(h.shape[0], 3, time, 4))
            .transpose(1, 2)
            .reshape(h.shape[0], time, 12)
        )

    analysis = hold(Between(crosswise), inputs())
    assert sets_of(analysis, "first.weight") == [("prunable", 4, 1)]


def test_an_input_beside_channels_has_a_settled_width() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(8, 12), nn.Linear(20, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.second(torch.cat([x, F.relu(self.first(x))], -1))))

    assert sets_of(hold(Beside(), inputs()), "first.weight") == [("prunable", 12, 1)]


class Lookup(nn.Module):
    """Channels in an order that a table gives for each length."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 12), nn.Linear(12, 5), nn.Linear(5, 4)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer(
            "orders", torch.stack([torch.randperm(12, generator=generator) for _ in range(20)])
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x))
        return self.last(F.relu(self.second(hidden + hidden[..., self.orders[x.shape[1] - 1]])))


def test_indices_that_a_size_picks_are_no_constants() -> None:
    assert ("frozen", 12, 1) in sets_of(hold(Lookup(), inputs()), "first.weight")
