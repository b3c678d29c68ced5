"""What lies where must hold at every size: reshapes that mix a dimension that varies from call to call with
channels, and cuts by a size; lengths that a weight fixes, and sequences padded to whole chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import made, wide
from oracle import assert_exact
from randomly import Between, hold, inputs, sets_of
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import fasp_fx
from fasp_fx.errors import StoreError
from fasp_fx.storage import _untrusted

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


def beside() -> nn.Module:
    """An input lies beside channels."""
    return made(
        lambda m, x: m.last(F.relu(m.second(torch.cat([x, F.relu(m.first(x))], -1)))),
        **linear(first=(8, 12), second=(20, 5), last=(5, 4)),
    )


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Between(_crosswise), ("prunable", 4, 1)),
        (beside, ("prunable", 12, 1)),
    ],
    ids=["blocks that a size deals out", "an input beside channels"],
)
def test_channels_beside_sizes(make: Callable[[], nn.Module], expected: tuple[str, int, int]) -> None:
    assert sets_of(hold(make(), inputs()), "first.weight") == [expected]


@pytest.mark.parametrize(
    "merge",
    [
        lambda h: h.view(h.shape[0], 24, h.shape[2] // 2, 2).permute(0, 1, 3, 2).flatten(1, 2),
        pytest.param(
            lambda h: h.unflatten(2, (-1, 2)).permute(0, 1, 3, 2).flatten(1, 2), marks=pytest.mark.slow
        ),
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
    "sort": lambda h: h.sort(-2)[0],
    "fourier": lambda h: torch.fft.fft(h, dim=-2).abs(),
    "flipped sum": lambda h: h.flip(-2).cumsum(-2).flip(-2),
    "softmax": lambda h: h.softmax(-2),
    "centred": lambda h: h - h.mean(-2, keepdim=True),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("flipped sum", "softmax") else name
        for name in ALONG_HEADS
    ],
)
def test_heads_lose_the_same_channels_where_an_operator_goes_across_them(name: str) -> None:
    analysis = hold(Between(lambda h: ALONG_HEADS[name](h.unflatten(-1, (3, 4))).flatten(-2)), inputs())
    assert sets_of(analysis, "first.weight") == [("prunable", 4, 1)], (
        "four channels, of all three heads at once"
    )


def test_heads_that_only_move_lose_other_channels_each() -> None:
    analysis = hold(Between(lambda h: h.unflatten(-1, (3, 4)).flip(-2).flatten(-2)), inputs())
    assert sets_of(analysis, "first.weight") == [("prunable", 12, 3)]


# --- Sequences whose length a weight fixes: tokens are features, and what is computed of their number is
# settled.


def linear(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*size) for name, size in sizes.items()}


#: what takes tokens by a number that is settled only afterwards, and how many are left of five
TAKEN: dict[str, tuple[Callable[[Tensor, int], Tensor], int]] = {
    "all but the last": (lambda x, count: x[:, : count - 1], 4),
    "the second half": (lambda x, count: x[:, count // 2 :], 3),
    "every second": (lambda x, count: x[:, :: count // 2], 3),
    "behind zeros": (lambda x, count: F.pad(x, (0, 0, count // 2, 0)), 7),
    "parts exchanged": (lambda x, count: torch.cat(x.split([count // 2, count - count // 2], 1)[::-1], 1), 5),
    "one in front": (lambda x, count: torch.cat([x[:, count - 2].unsqueeze(1), x], 1), 6),
}


@pytest.mark.parametrize("name", TAKEN)
def test_tokens_are_taken_by_a_number_that_is_settled_afterwards(name: str) -> None:
    """Of those that a layer makes, by the number of those of another input."""
    take, left = TAKEN[name]

    def forward(m: Any, x: Tensor, other: Tensor) -> Tensor:
        taken = take(m.down(F.gelu(m.up(other))).transpose(1, 2), x.shape[1]).transpose(1, 2)
        return m.last(m.down_again(F.gelu(m.up_again(taken))).transpose(1, 2) + m.own(x))

    torch.manual_seed(0)
    sizes = {"up": (4, 7), "down": (7, 5), "up_again": (left, 4), "down_again": (4, 5), "own": (6, 8)}
    model = made(forward, **linear(**sizes, last=(8, 3))).double()
    args, others = ((torch.randn(n, 5, 6).double(), torch.randn(n, 8, 4).double()) for n in (2, 3))
    result = fasp_fx.prune(model, args, score="random", restore=None, sparsity=0.5)
    assert not result.report.notes
    assert "up_again.weight" in {part.name for group in result.plan.groups for part in group.consumers}
    assert_exact(model, result, args, others)


# --- inputs joined side by side: where one ends decides which weights meet the next


def joined() -> nn.Module:
    """A projected input between two others."""
    return made(
        lambda m, before, x, after: m.out(torch.cat([before, m.middle(x), after], dim=-1)),
        middle=nn.Linear(4, 6),
        out=nn.Sequential(nn.Linear(14, 8), nn.ReLU(), nn.Linear(8, 2)),
    )


ARGS = (torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4))


def test_their_widths_are_fixed_and_what_lies_between_is_pruned() -> None:
    torch.manual_seed(0)
    model = joined()
    result = fasp_fx.prune(model, ARGS, sparsity=0.4, score="random", restore=None)
    assert {part.name for group in result.plan.groups for part in group.producers} == {
        "middle.weight",
        "middle.bias",
        "out.0.weight",
        "out.0.bias",
    }
    assert_exact(model, result, ARGS, tuple(torch.randn(5, 4) for _ in ARGS))
    with pytest.raises(fasp_fx.CallError, match=r"captured for before.shape\[1\] == 4"):
        result.module(torch.randn(3, 5), torch.randn(3, 4), torch.randn(3, 3))


def test_what_the_caller_lets_vary_freezes_what_lies_between() -> None:
    """Widths that may trade with each other leave no fixed place for what lies between."""
    shapes = ({1: Dim.AUTO}, None, {1: Dim.AUTO})
    analysis = fasp_fx.analyze(joined(), ARGS, dynamic_shapes=shapes)
    reasons = {group.producers[0].name: group.reason for group in analysis.groups if group.producers}
    assert "a length known only at run time" in reasons["middle.weight"]
    assert [group.producers[0].name for group in analysis.select("prunable")] == ["out.0.weight"]


# --- Sequences are padded to whole chunks, by nothing where they fill them.


def behind() -> nn.Module:
    """Reads channels, padded to an even number of tokens, in the order in which they lie."""

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = F.pad(m.up(x).transpose(1, 2), (0, x.shape[1] % 2))
        pairs = torch.einsum("bcpk,k->bcp", hidden.unflatten(2, (-1, 2)), torch.ones(2, dtype=x.dtype))
        return m.down(pairs.transpose(1, 2))

    return wide(forward, hidden=8)


@pytest.mark.parametrize("length", [7, 8])
def test_what_fills_its_chunks_is_pruned_exactly_and_saved(length: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, calls = behind().double(), [torch.randn(samples, length, 6).double() for samples in (2, 3)]
    result = fasp_fx.prune(model, (calls[0],), score="random", restore=None, sparsity=0.2)
    assert_exact(model, result, *((x,) for x in calls))
    loaded = fasp_fx.load(result.save(tmp_path / "out")).module
    assert all(torch.equal(loaded(x), result.module(x)) for x in calls)
    again = fasp_fx.prune(result.module, (calls[0],), score="random", restore=None, sparsity=0.2)
    copies = [
        len(one.program.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default))
        for one in (result, again)
    ]
    assert copies[0] == copies[1], "captured again it copies no more"


def test_sizes_that_are_too_long_to_be_stored_are_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = fasp_fx.prune(behind(), (torch.randn(2, 7, 6),), score="random", restore=None, sparsity=0.2)
    monkeypatch.setattr(_untrusted, "PARTS", 1)
    with pytest.raises(StoreError, match="longer than what is stored"):
        result.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())
