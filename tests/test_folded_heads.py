"""Channels that lie along a dimension whose size varies: heads folded into the batch, as
``nn.MultiheadAttention`` has them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from captures import one_capture
from fasp_fx.channels import repeating
from hypothesis import given
from hypothesis import strategies as st
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, nn

import fasp_fx
import fasp_fx.patterns

pytestmark = pytest.mark.usefixtures("shared_captures")


class Attended(nn.Module):
    """Attention between two layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.attention, self.up, self.out = (
            nn.Linear(8, 12),
            nn.MultiheadAttention(12, 3, batch_first=True, **options),
            nn.Linear(12, 16),
            nn.Linear(16, 8),
        )

    def inside(self, h: Tensor) -> Tensor:
        return h.relu()

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        h = self.attention(h, h.relu(), h)[0]
        y: Tensor = self.out(self.inside(self.up(h)))
        return y


class Outside(nn.Module):
    """Heads before the batch, ``aabb``, in a dimension of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (
            nn.Linear(6, 12),
            nn.Linear(6, 12),
            nn.Linear(6, 12),
            nn.Linear(12, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (2, 6)).permute(2, 0, 1, 3).flatten(0, 1)
            for part in (self.q, self.k, self.v)
        )
        h = (q @ k.transpose(-1, -2) / 3).softmax(-1) @ v
        y: Tensor = self.out(h.unflatten(0, (2, -1)).permute(1, 2, 0, 3).flatten(2))
        return y


class Squared(nn.Module):
    """Channels that are multiplied with one another, in both dimensions of the result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.b, self.down = nn.Conv1d(4, 8, 1), nn.Conv1d(8, 8, 1), nn.Conv1d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        y: Tensor = self.down(torch.tanh(h @ h.transpose(1, 2)) @ torch.relu(self.b(h)))
        return y


@pytest.mark.parametrize("make", [Attended, Outside])
@pytest.mark.parametrize("quality", ["fast", "balanced"])
def test_exempt_channels_are_exact_at_every_batch_size(make: Any, quality: Any) -> None:
    model = make().eval()
    width = 8 if make is Attended else 6
    data = [
        torch.randn(size, 5, width, generator=torch.Generator().manual_seed(size))
        for size in (4, 4, 4, 4, 4, 3, 1)
    ]
    with one_capture():
        for example in (data[0], torch.randn(1, 5, width)):
            result = fasp_fx.prune(
                model,
                (example,),
                calibration=data,
                include=("exempt",),
                sparsity=0.3,
                quality=quality,
                allocation="uniform",
            )
            assert any(not group.consumers for group in result.plan.groups)
            assert not [note for note in result.report.notes if "not run" in note or "whole" in note]
            result = fasp_fx.apply(model, result.plan, (example,))
            for size in (1, 2, 5, 8):
                x = torch.randn(size, 7, width)
                with torch.no_grad():
                    assert error(result.module(x), zeroed(model, result.plan, producers=True)(x)) <= TOLERANCE


def test_the_channel_whose_product_is_least_goes_first() -> None:
    """By the norms over all sequences, whichever way heads lie beside them."""
    model = Outside().eval()
    data = [torch.randn(size, 7, 6, generator=torch.Generator().manual_seed(size)) for size in (5, 5, 3)]
    result = fasp_fx.prune(
        model, (data[0],), calibration=data, include=("exempt",), sparsity=0.2, quality="fast"
    )
    (rows,) = [
        part.removed
        for group in result.plan.groups
        if not group.consumers
        for part in group.producers
        if part.name == "q.weight"
    ]
    with torch.no_grad():
        q, k = (
            torch.cat([part(x).flatten(0, 1) for x in data]).reshape(-1, 2, 6).norm(dim=0)
            for part in (model.q, model.k)
        )
    count = len(rows) // 2
    assert count
    assert set(rows) == {
        head * 6 + int(channel) for head in range(2) for channel in (q * k)[head].argsort()[:count]
    }


def test_a_wrong_rule_is_seen_beside_exempt_channels() -> None:
    """The check by running masks them at sizes that are not those of the analysis, and sees what else is
    wrong there.
    """

    @torch.library.custom_op("fasp_fx_tests::turned", mutates_args=())
    def turned(self: Tensor) -> Tensor:
        return self.roll(1, -1)

    @turned.register_fake
    def _(self: Tensor) -> Tensor:
        return torch.empty_like(self)

    class Turned(Attended):
        def inside(self, h: Tensor) -> Tensor:
            return torch.ops.fasp_fx_tests.turned(h).relu()  # type: ignore[no-any-return]

    operator = torch.ops.fasp_fx_tests.turned.default
    fasp_fx.patterns.register(operator, "self[...] -> [...]")
    try:
        for size in (2, 4):
            x = torch.randn(size, 5, 8)
            with pytest.warns(fasp_fx.VerificationWarning, match=r"'out\.weight' stays whole"):
                result = fasp_fx.prune(
                    Turned().eval(), (x,), include=("exempt",), sparsity=0.3, score="random", restore=None
                )
            assert any(not group.consumers for group in result.plan.groups)
    finally:
        fasp_fx.patterns.unregister(operator)


def test_both_dimensions_of_a_product_are_masked() -> None:
    model, x = Squared().eval(), torch.randn(2, 4, 9)
    result = fasp_fx.prune(model, (x,), include=("exempt",), sparsity=0.3, score="random", restore=None)
    assert result.plan.groups
    assert not [note for note in result.report.notes if "whole" in note]


def test_a_row_behind_the_keys_loses_the_same_channels() -> None:
    model = Attended(add_bias_kv=True, add_zero_attn=True).eval()
    data = [torch.randn(size, 5, 8) for size in (4, 4, 4, 3)]
    result = fasp_fx.prune(model, (data[0],), calibration=data, include=("exempt",), sparsity=0.3)
    result = fasp_fx.apply(model, result.plan, (data[0],))
    for size in (1, 3, 6):
        x = torch.randn(size, 7, 8)
        with torch.no_grad():
            assert error(result.module(x), zeroed(model, result.plan, producers=True)(x)) <= TOLERANCE


@given(
    own=st.integers(1, 4),
    first=st.integers(2, 4),
    then=st.integers(1, 5),
    runs=st.booleans(),
    width=st.integers(1, 3),
)
def test_numbers_are_laid_out_at_other_sizes(own: int, first: int, then: int, runs: bool, width: int) -> None:
    size = torch.export.Dim("size")
    exported = torch.export.export(nn.Identity(), (torch.zeros(7, width),), dynamic_shapes=({0: size},))
    recorded = next(iter(exported.graph.nodes)).meta["val"].shape
    numbers = np.arange(own * width).reshape(own, width)

    def lay(count: int) -> torch.Tensor:
        return torch.from_numpy(np.repeat(numbers, count, 0) if runs else np.tile(numbers, (count, 1)))

    lying = repeating(lay(first), recorded)
    assert lying is not None
    assert torch.equal(
        lying.at((own * then, width)).expand(own * then, width), lay(then).expand(own * then, width)
    )
    values = torch.randn(own * then, width, dtype=torch.float64)
    expected = torch.zeros(own * width, dtype=torch.float64).index_add_(
        0, lay(then).reshape(-1), values.reshape(-1)
    )
    torch.testing.assert_close(
        torch.zeros_like(expected).index_add_(0, lying.numbers.reshape(-1), lying.summed(values).reshape(-1)),
        expected,
    )


def test_numbers_that_do_not_repeat_have_no_place_at_other_sizes() -> None:
    exported = torch.export.export(
        nn.Identity(), (torch.zeros(7, 1),), dynamic_shapes=({0: torch.export.Dim("size")},)
    )
    recorded = next(iter(exported.graph.nodes)).meta["val"].shape
    assert repeating(torch.tensor([0, 1, 2])[:, None], recorded) is None
    assert repeating(torch.tensor([0, 0, 1, 2])[:, None], recorded) is None
    assert repeating(torch.tensor([0, 1, 2])[:, None], (3, 1)) is not None
