"""Stacks of weights of which a model takes one by one: experts in a loop, weights and scales of all layers in
one parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import made, parameter
from oracle import TOLERANCE, error, zeroed
from randomly import hold, inputs, sets_of
from torch import Tensor, nn

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

COUNT, WIDTH, INNER = 3, 8, 12
ROWS, UNSEEN = (
    torch.randn(64, 5, generator=torch.Generator().manual_seed(0)),
    torch.randn(7, 5, generator=torch.Generator().manual_seed(1)),
)


def stacked(step: Callable[[Any, Tensor, int], Tensor], positions: tuple[int, ...] = (0, 1, 2)) -> nn.Module:
    """``step(model, x, i)`` for some ``i``, added up, between two layers."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.stack([step(self, x, i) * (i + 1) for i in positions]).sum(0).tanh())

    return made(
        forward,
        up=parameter(COUNT, INNER, WIDTH, scale=1 / 3),
        down=parameter(COUNT, WIDTH, INNER, scale=1 / 3),
        swapped=parameter(INNER, COUNT, WIDTH, scale=1 / 3),
        bias=parameter(COUNT, INNER),
        ups=nn.ModuleList(nn.Linear(WIDTH, INNER) for _ in range(COUNT)),
        downs=nn.ModuleList(nn.Linear(INNER, WIDTH) for _ in range(COUNT)),
        first=nn.Linear(5, WIDTH),
        last=nn.Linear(WIDTH, 4),
    )


def _unbound(m: Any, x: Tensor, i: int) -> Tensor:
    up, down = list(m.up)[i], m.down.unbind(0)[i]
    return F.linear(F.linear(x, up).tanh(), down)


#: how one position is used
STEPS: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "linear": lambda m, x, i: F.linear(F.linear(x, m.up[i]).tanh(), m.down[i]),
    "with biases": lambda m, x, i: F.linear(F.linear(x, m.up[i], m.bias[i]).tanh(), m.down[i]),
    "transposed products": lambda m, x, i: (x @ m.up[i].t()).tanh() @ m.down[i].transpose(0, 1),
    "unbound": _unbound,
    "along another dimension": lambda m, x, i: F.linear(F.linear(x, m.swapped[:, i]).tanh(), m.down[i]),
    "other consumers": lambda m, x, i: m.downs[i](F.linear(x, m.up[i], m.bias[i]).tanh()),
    "other producers": lambda m, x, i: F.linear(m.ups[i](x).tanh(), m.down[i]),
    "scales": lambda m, x, i: m.downs[i](m.ups[i](x).tanh() * m.bias[i]),
}


def _assert_exact(model: nn.Module, result: fasp_fx.Result) -> None:
    reference = zeroed(model, result.plan)
    with torch.no_grad():
        dense, expected, found = model(UNSEEN), reference(UNSEEN), result.module(UNSEEN)
    assert error(expected, dense) > 100 * TOLERANCE, "nothing was tested"
    assert error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("name", STEPS)
def test_stacks_are_pruned_exactly(name: str) -> None:
    torch.manual_seed(0)
    model = stacked(STEPS[name])
    found = [(group.status, group.size, group.blocks) for group in fasp_fx.analyze(model, (ROWS,)).groups]
    assert ("prunable", INNER, 1) in found, "the same channels of each"
    for seed in range(2):
        torch.manual_seed(seed)
        result = fasp_fx.prune(model, (ROWS,), sparsity=0.4, score="random", restore=None)
        _assert_exact(model, result)


def test_restoration_repairs_every_matrix_of_a_stack() -> None:
    torch.manual_seed(0)
    model = stacked(STEPS["linear"])
    restored = fasp_fx.prune(
        model, (ROWS,), calibration=[(ROWS,)], sparsity={"down": 0.3}, quality="fast", restore="least-squares"
    )
    cut = fasp_fx.apply(model, restored.plan, (ROWS,))
    (part,) = [part for group in restored.plan.groups for part in group.consumers if part.name == "down"]
    kept = [channel for channel in range(INNER) if channel not in part.removed]
    with torch.no_grad():
        x = model.first(ROWS)
        for expert in range(COUNT):
            inner = (x @ model.up[expert].t()).tanh()
            errors = [
                (inner[:, kept] @ result.module.down[expert].t() - inner @ model.down[expert].t()).norm()
                for result in (restored, cut)
            ]
            assert errors[0] < errors[1]


def test_what_is_never_taken_goes_along() -> None:
    torch.manual_seed(0)
    model = stacked(STEPS["linear"], positions=(0, 2))
    result = fasp_fx.prune(model, (ROWS,), sparsity=0.4, score="random", restore=None)
    _assert_exact(model, result)
    shapes = {name: tuple(parameter.shape) for name, parameter in result.module.named_parameters()}
    assert shapes["up"][0] == shapes["down"][0] == COUNT
    assert shapes["down"][2] < INNER


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(lambda v: v[torch.arange(3).flip(0)], id="computed"),
        pytest.param(lambda v: v[[0, 0, 2]], id="one twice"),
        pytest.param(lambda v: v[torch.tensor([2, 0, 1])], id="permuted"),
    ],
)
def test_indices_into_a_stack(index: Callable[[Tensor], Tensor]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = F.relu(torch.einsum("btd,efd->ebtf", x, self.into))
        taken = torch.einsum("ebtf,eof->bto", hidden, index(self.out))
        return self.last(F.relu(self.third(taken)))

    weights = {"into": parameter(3, 12, 8), "out": parameter(3, 5, 12)}
    model = made(forward, **weights, third=nn.Linear(5, 16), last=nn.Linear(16, 4))
    analysis = hold(model, inputs())
    assert ("prunable", 16, 1) in sets_of(analysis, "third.weight")
