"""Memory layouts: what is captured on inputs that lie in order is right for those that lie otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import block, made
from oracle import assert_mask_exact, zeroed
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx

X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(2))


def _apart(x: Tensor) -> Tensor:
    """Every other entry along the last dimension of a larger tensor, from the second on."""
    return torch.stack((x + 1, x), -1).flatten(-2)[..., 1::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "in order": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "every other number": _apart,
    "reversed, every other sample": lambda x: _apart(x.permute(3, 2, 1, 0)).permute(3, 2, 1, 0),
}


def _bag(x: Tensor) -> Tensor:
    return F.embedding_bag(torch.tensor([[0, 1, 2], [3, 5, 0]]), x[0, 0, :, ::2])


#: operators whose decompositions ask how their operands lie, or need them in order
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "unfold": lambda x: x.unfold(2, 3, 2),
    "diagonal": lambda x: x.diagonal(1, 2, 3),
    "diag": lambda x: torch.diag(x[0, 1]),
    "trace": lambda x: torch.trace(x[0, 1]),
    "repeated letter": lambda x: torch.einsum("bcii->bci", x),
    "stft": lambda x: torch.stft(
        x[:, 0, 0], 4, 2, window=torch.ones(4), center=False, return_complex=True
    ).abs(),
    "bag": _bag,
    "ordered": lambda x: x.contiguous().view(3, -1),
    "patches": lambda x: F.unfold(x, 3),
    "shuffled": lambda x: F.pixel_shuffle(x, 2),
    "product": lambda x: torch.einsum("bcij,bdjk->bik", x, x),
    "filled": lambda x: x.index_fill(3, torch.tensor([1, 4]), 2.0),
    "written": lambda x: (x * 1.0).relu_().unfold(3, 2, 1),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_programs_are_right_however_their_inputs_lie(name: str) -> None:
    torch.manual_seed(0)
    operator = OPERATORS[name]

    def forward(self: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        hidden = self.up(x).relu()
        return self.down(hidden), operator(x), operator(x.permute(0, 1, 3, 2) + 1), operator(block(self, x))

    model = made(forward, up=nn.Linear(6, 12), down=nn.Linear(12, 6))
    result = fasp_fx.prune(model, (X,), score="magnitude", restore=None, sparsity=0.4)
    masked = zeroed(model, result.plan)
    assert any(group.removed_sets for group in result.plan.groups)
    for lie in LAYOUTS.values():
        x = lie(X)
        assert torch.equal(x, X)
        for found, expected in zip(result.module(x), masked(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "operator", [lambda x: x.unfold(1, 3, 2).movedim(2, -1), lambda x: x.diagonal(0, 0, 1).movedim(0, -1)]
)
def test_channels_pass_by_what_is_taken_along_other_dimensions(operator: Callable[[Tensor], Tensor]) -> None:
    model = made(lambda self, x: self.down(operator(self.up(x))), up=nn.Linear(6, 12), down=nn.Linear(12, 4))
    result = fasp_fx.prune(model, (X[:, 0, :5],), score="magnitude", restore=None, sparsity=0.5)
    assert result.module.get_parameter("up.weight").shape == (6, 6)
    assert_mask_exact(model, result, lambda module: module(X[:, 0, :5]))
