"""Small models and what it means to refuse an input: a typed error, and nothing changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasp_fx


class Net(nn.Module):
    """Token numbers or vectors through one feed-forward block with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, ids: Tensor, bias: Tensor | None = None) -> Tensor:
        hidden = self.embed(ids)
        if bias is not None:
            hidden = hidden + bias
        return hidden + self.down(torch.relu(self.up(hidden)))


class Vectors(nn.Module):
    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 24), nn.Linear(24, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


IDS = torch.arange(10).reshape(2, 5)
X = torch.linspace(-1, 1, 18).reshape(3, 6)
BATCH = torch.linspace(-2, 2, 240).reshape(40, 6).sin()


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The model has the same tensors with the same values, modes and attributes afterwards."""

    def tensors() -> dict[str, Tensor]:
        return dict(
            [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        )

    before = {
        name: (tensor, tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors().items()
    }
    modes = [module.training for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    yield
    after = tensors()
    assert after.keys() == before.keys()
    for name, (tensor, value, grad) in before.items():
        assert after[name] is tensor
        assert tensor.requires_grad == grad
        assert tensor.grad is None
        assert tensor.device.type == "meta" or torch.equal(
            tensor.view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)
        ), name
    assert [module.training for module in model.modules()] == modes
    assert [sorted(vars(module)) for module in model.modules()] == attributes


def refused(
    error: type[fasp_fx.FaspError],
    match: str,
    model: nn.Module | None = None,
    args: Any = (X,),
    **options: Any,
) -> None:
    """Pruning raises this error with this message and touches nothing."""
    model = Vectors().eval() if model is None else model
    options.setdefault("calibration", [BATCH])
    with untouched(model), pytest.raises(error, match=match) as caught:
        fasp_fx.prune(model, args, **options)
    assert isinstance(caught.value, fasp_fx.FaspError)
