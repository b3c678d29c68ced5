"""Results are models like any other: pruned again, each step is held against the masked model it started
from.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import made, parameter
from oracle import error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fasp_fx
from fasp_fx.testing.oracle import Masked

pytestmark = pytest.mark.usefixtures("no_files", "shared_captures")


def _low_rank() -> nn.Module:
    """A weight that is a product of two, and is folded."""
    return made(
        lambda self, x: F.linear(F.gelu(self.up(x)), self.u @ self.v),
        u=parameter(8, 28, scale=0.4),
        v=parameter(28, 32, scale=0.4),
        up=nn.Linear(8, 32),
    )


def _heads(fused: bool = True) -> nn.Module:
    """Queries, keys and values of one product (of low rank), head by head: split, and values padded to the
    width of the queries.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        projected = F.linear(x, self.u @ self.v if fused else self.u)
        q, k, v = projected.view(*x.shape[:2], 4, 3, 8).permute(3, 0, 2, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))

    return made(
        forward, u=parameter(96, 32, scale=0.3), v=parameter(32, 32, scale=0.3), out=nn.Linear(32, 32)
    )


def _image() -> nn.Module:
    """Convolutions, one of them depthwise, flattened into a linear layer."""
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 12, 3, padding=1)),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(1),
        nn.Linear(16 * 16, 5),
    )


def _steps() -> nn.Module:
    return made(
        lambda self, x: self.out(self.layer(x)[0]),
        layer=nn.LSTM(5, 12, num_layers=2, batch_first=True, bidirectional=True),
        out=nn.Linear(24, 3),
    )


def _gated() -> nn.Module:
    """Gates and what they gate are every other row of one weight."""
    return made(
        lambda self, x: self.down(F.silu((hidden := self.up(x))[..., ::2]) * hidden[..., 1::2]),
        up=nn.Linear(8, 48),
        down=nn.Linear(24, 8),
    )


CASES: dict[str, tuple[Any, Tensor, Tensor, dict[str, Any]]] = {
    "low rank": (_low_rank, torch.randn(3, 8), torch.randn(7, 8), {}),
    "heads of low rank": (_heads, torch.randn(2, 5, 32), torch.randn(1, 9, 32), {}),
    "heads, queries too": (
        lambda: _heads(fused=False),
        torch.randn(2, 5, 32),
        torch.randn(3, 4, 32),
        {"include": ("exempt",)},
    ),
    "image": (_image, torch.randn(2, 3, 8, 8), torch.randn(5, 3, 8, 8), {}),
    "recurrent": (_steps, torch.randn(2, 4, 5), torch.randn(3, 7, 5), {}),
    "gated": (_gated, torch.randn(3, 8), torch.randn(6, 8), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_result_is_pruned_again(name: str) -> None:
    make, example, other, options = CASES[name]
    torch.manual_seed(0)
    model: Any = make().eval()
    model = fasp_fx.prune(
        model, (example,), score="random", restore=None, sparsity=0.001, **options
    ).module  # folded, but whole
    size = sum(parameter.numel() for parameter in model.parameters())
    result = fasp_fx.prune(model, (example,), score="random", restore=None, sparsity=0.12, **options)
    expected = Masked(model, result.plan)
    with torch.no_grad():
        assert error(expected(other), model(other)) > 1e-3
        for x in (example, other):
            assert error(result.module(x), expected(x)) < 1e-5
    fasp_fx.apply(model, fasp_fx.PruningPlan.from_json(result.plan.to_json()), (example,))
    assert sum(parameter.numel() for parameter in result.module.parameters()) < size


def test_the_oracle_says_that_a_folded_weight_is_not_in_the_dense_model() -> None:
    model = _low_rank()
    plan = fasp_fx.prune(model, (torch.randn(3, 8),), score="magnitude", restore=None, sparsity=0.2).plan
    with pytest.raises(
        fasp_fx.ArgumentError, match="'v_folded', which this model does not hold: it computes it"
    ):
        Masked(model, plan)
