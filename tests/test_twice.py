"""Results are models like any other: pruned again, each step is held against the masked model it started
from.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fasp_fx
from fasp_fx.testing.oracle import Masked

pytestmark = pytest.mark.usefixtures("no_files", "shared_captures")


class LowRank(nn.Module):
    """A weight that is a product of two, and is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v, self.up = (
            nn.Parameter(torch.randn(8, 28) * 0.4),
            nn.Parameter(torch.randn(28, 32) * 0.4),
            nn.Linear(8, 32),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(self.up(x)), self.u @ self.v)


class Heads(nn.Module):
    """Queries, keys and values of one product (of low rank), head by head: split, and values padded to the
    width of the queries.
    """

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.u, self.v, self.out = (
            nn.Parameter(torch.randn(96, 32) * 0.3),
            nn.Parameter(torch.randn(32, 32) * 0.3),
            nn.Linear(32, 32),
        )
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            F.linear(x, self.u @ self.v if self.fused else self.u)
            .view(*x.shape[:2], 4, 3, 8)
            .permute(3, 0, 2, 1, 4)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Image(nn.Module):
    """Convolutions, one of them depthwise, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = (
            parametrizations.weight_norm(nn.Conv2d(3, 12, 3, padding=1)),
            nn.BatchNorm2d(12),
        )
        self.each, self.last, self.out = (
            nn.Conv2d(12, 12, 3, padding=1, groups=12),
            nn.Conv2d(12, 16, 1),
            nn.Linear(16 * 16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.each(F.relu(self.norm(self.first(x)))))
        return self.out(F.max_pool2d(F.relu(self.last(hidden)), 2).flatten(1))


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = (
            nn.LSTM(5, 12, num_layers=2, batch_first=True, bidirectional=True),
            nn.Linear(24, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0])


class Gated(nn.Module):
    """Gates and what they gate are every other row of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 48), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(F.silu(hidden[..., ::2]) * hidden[..., 1::2])


CASES: dict[str, tuple[Any, Tensor, Tensor, dict[str, Any]]] = {
    "low rank": (LowRank, torch.randn(3, 8), torch.randn(7, 8), {}),
    "heads of low rank": (Heads, torch.randn(2, 5, 32), torch.randn(1, 9, 32), {}),
    "heads, queries too": (
        lambda: Heads(fused=False),
        torch.randn(2, 5, 32),
        torch.randn(3, 4, 32),
        {"include": ("exempt",)},
    ),
    "image": (Image, torch.randn(2, 3, 8, 8), torch.randn(5, 3, 8, 8), {}),
    "recurrent": (Steps, torch.randn(2, 4, 5), torch.randn(3, 7, 5), {}),
    "gated": (Gated, torch.randn(3, 8), torch.randn(6, 8), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_result_is_pruned_again(name: str) -> None:
    make, example, other, options = CASES[name]
    torch.manual_seed(0)
    model: Any = make().eval()
    model = fasp_fx.prune(
        model, (example,), score="random", restore=None, sparsity=0.001, **options
    ).module  # folded, but whole
    sizes = [sum(parameter.numel() for parameter in model.parameters())]
    for _ in range(2):
        result = fasp_fx.prune(model, (example,), score="random", restore=None, sparsity=0.12, **options)
        expected = Masked(model, result.plan)
        with torch.no_grad():
            assert error(expected(other), model(other)) > 1e-3
            for x in (example, other):
                assert error(result.module(x), expected(x)) < 1e-5
        fasp_fx.apply(model, fasp_fx.PruningPlan.from_json(result.plan.to_json()), (example,))
        model = result.module
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert sizes == sorted(set(sizes), reverse=True)


def test_the_oracle_says_that_a_folded_weight_is_not_in_the_dense_model() -> None:
    model = LowRank().eval()
    plan = fasp_fx.prune(model, (torch.randn(3, 8),), score="magnitude", restore=None, sparsity=0.2).plan
    with pytest.raises(
        fasp_fx.ArgumentError, match="'v_folded', which this model does not hold: it computes it"
    ):
        Masked(model, plan)
