"""What a capture leaves out: what nothing reads, and derivatives that a function defines; and sizes that it
fixes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import made
from oracle import zeroed
from torch import Tensor, nn

import fasp_fx

X = torch.randn(4, 8)


def layers(forward: Any, **held: Any) -> Any:
    return made(forward, **{"up": nn.Linear(8, 24), "down": nn.Linear(24, 5), **held})


def logs(self: Any, x: Tensor) -> Tensor:
    hidden = self.up(x).relu()
    hidden.cumsum(-1).mean()
    return self.down(hidden)


def draws(self: Any, x: Tensor) -> Tensor:
    torch.rand(3)
    return self.down(self.up(x).relu()) + torch.rand(5)


def test_what_nothing_reads_keeps_no_channel() -> None:
    groups = [group for group in fasp_fx.analyze(layers(logs), (X,)).groups if group.size == 24]
    assert [group.status for group in groups] == ["prunable"]


def test_random_numbers_that_nothing_reads_are_drawn_all_the_same() -> None:
    model = layers(draws)
    result = fasp_fx.prune(model, (X,), sparsity=0.05, score="magnitude", restore=None)
    for module in (result.module, fasp_fx.apply(model, result.plan, (X,)).module):
        torch.manual_seed(3)
        found = module(X) - module(X)
        torch.manual_seed(3)
        assert torch.allclose(found, model(X) - model(X), atol=1e-5)


class Rounded(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_a_derivative_that_a_graph_does_not_have_is_said() -> None:
    for forward, says in (
        (lambda self, x: self.down(Rounded.apply(self.up(x))), True),
        (lambda self, x: self.down(torch.round(self.up(x))), False),
    ):
        notes = fasp_fx.capture(layers(forward), (X,)).program.notes
        assert any("derivative that Rounded defines" in note for note in notes) == says
    assert "apply" in vars(torch.autograd.Function)
    assert Rounded.apply(torch.ones(1, requires_grad=True)).grad_fn is not None


def test_a_size_that_is_asked_for_is_said_with_the_line() -> None:
    model = layers(lambda self, x: self.down(self.up(x).relu()) * torch.ones(int(x.shape[0]), 1))
    (note,) = fasp_fx.capture(model, (X,)).program.notes
    assert "the size 4 of dimension 0 of 'x' is fixed, because forward asks for it as a number" in note
    assert "test_capture_notes.py, line " in note


def maps(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Maps a function over samples, beside an ordinary block."""
    mapped = torch.func.vmap(lambda row: self.down(self.up(row).relu()))(x)
    return self.right(self.left(x).relu()), mapped


@pytest.mark.parametrize("options", [{}, {"quality": "fast"}], ids=["by losses", "plainly"])
def test_what_is_mapped_over_samples_is_pruned(options: dict[str, Any]) -> None:
    """The exporter leaves steps of the transformation in the graph, which change what later calls mean."""
    torch.manual_seed(0)
    sizes = {"up": (5, 8), "down": (8, 6), "left": (5, 7), "right": (7, 2)}
    model = made(maps, **{name: nn.Linear(*size) for name, size in sizes.items()})
    data = [torch.randn(40, 5) for _ in range(2)]
    result = fasp_fx.prune(model, (data[0],), calibration=data, sparsity=0.3, restore=None, **options)
    torch.zeros(2).requires_grad_(True)  # torch is as it was
    assert {"down.weight", "right.weight"} >= {
        part.name for group in result.plan.groups for part in group.consumers
    }
    dense = zeroed(model, result.plan)
    for found, expected in zip(result.module(torch.ones(3, 5)), dense(torch.ones(3, 5)), strict=True):
        torch.testing.assert_close(found, expected)
