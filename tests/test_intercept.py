"""Repairs of consumers that add a bias: what goes had a mean, which the bias gives in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import decide
from models import block, made, parameter, wide
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx
from fasp_fx.calibration import decided
from fasp_fx.pruning import PruningConfig
from fasp_fx.pruning.check import restricted


def data(width: int, count: int = 8, rows: int = 64) -> list[Tensor]:
    return [torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def _constants(bias: bool = True) -> Any:
    """A hidden layer of which every second neuron is the same, and not zero, whatever comes in."""
    torch.manual_seed(0)
    model: Any = wide(block, hidden=12, down=nn.Linear(12, 4, bias=bias))
    with torch.no_grad():
        model.up.weight[::2] = 0
        model.up.bias[::2] = torch.rand(6) + 1
    return model


def outputs_off(result: Any, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        dense = model(x)
        return float((result.module(x) - dense).norm() / dense.norm())


def test_what_is_constant_goes_at_no_cost_where_there_is_a_bias() -> None:
    batches = data(6)
    for quality in ("balanced", "best"):
        model = _constants()
        result = fasp_fx.prune(model, (batches[0],), calibration=batches, sparsity=0.33, quality=quality)  # type: ignore[arg-type]
        assert len(result.plan.groups[0].consumers[0].removed) == 4
        assert set(result.plan.groups[0].consumers[0].removed) <= set(range(0, 12, 2))
        assert outputs_off(result, model, torch.randn(50, 6)) < 2e-3  # what the least of the ridges leaves


def _convolved(groups: int) -> nn.Module:
    down = nn.Conv1d(8, 4, 3, padding=1, groups=groups)
    return made(lambda self, x: self.down(torch.sigmoid(self.up(x))), up=nn.Conv1d(3, 8, 1), down=down)


def _multiplied() -> nn.Module:
    return made(
        lambda self, x: torch.addmm(self.bias, torch.sigmoid(self.up(x)), self.weight),
        up=nn.Linear(3, 8),
        weight=parameter(8, 4),
        bias=parameter(4),
    )


@pytest.mark.parametrize(
    ("make", "groups"),
    [(lambda: _convolved(1), 1), (lambda: _convolved(2), 2), (_multiplied, 1)],
    ids=["conv", "grouped", "addmm"],
)
def test_every_operator_that_adds_a_bias(make: Callable[[], nn.Module], groups: int) -> None:
    """The output of the repaired consumer is as near to the dense one's as a least-squares solve
    brings it.
    """
    torch.manual_seed(0)
    model = make()
    convolves = hasattr(model, "down")
    x = torch.randn(400, 3, 10) if convolves else torch.randn(2000, 3)
    found = fasp_fx.prune(model, (x[:4],), calibration=list(x.chunk(8)), sparsity=0.3).module
    up = [found.get_parameter(f"up.{name}") for name in ("weight", "bias")]
    with torch.no_grad():
        hidden = torch.sigmoid(F.conv1d(x, *up) if convolves else F.linear(x, *up))
        seen = F.unfold(hidden[:, :, None], (1, 3), padding=(0, 1)) if convolves else hidden
        parts = (  # [positions, columns] of each group
            part.movedim(1, -1).flatten(0, -2).double().chunk(groups, -1)
            for part in (seen, model(x), found(x))
        )
    assert seen.shape[1] < (24 if convolves else 8)
    for own, target, got in zip(*parts, strict=True):
        beside = torch.cat([own, own.new_ones(len(own), 1)], 1)
        least = (beside @ torch.linalg.lstsq(beside, target).solution - target).norm()
        assert (got - target).norm() < 1.05 * least + 1e-3 * target.norm()


def _shared() -> nn.Module:
    """Two consumers that add one bias, and one that scales its own."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = x + F.linear(torch.sigmoid(self.up(x)), self.first, self.both)
        h = h + F.linear(torch.sigmoid(self.middle(h)), self.second, self.both)
        return torch.addmm(self.scaled, torch.sigmoid(self.last(h)), self.third, beta=0.5)

    torch.manual_seed(0)
    shapes = {"first": (6, 12), "second": (6, 12), "third": (12, 6), "both": (6,), "scaled": (6,)}
    return made(
        forward,
        **{name: nn.Linear(6, 12) for name in ("up", "middle", "last")},
        **{name: parameter(*shape) for name, shape in shapes.items()},
    )


def test_a_bias_that_is_read_elsewhere_or_scaled_stays_as_it_is() -> None:
    model, batches = _shared(), data(6)
    result = fasp_fx.prune(model, (batches[0],), calibration=batches, sparsity=0.4)
    assert {group.consumers[0].name for group in result.plan.groups} == {"first", "second", "third"}
    for name in ("both", "scaled"):
        assert torch.equal(result.module.get_parameter(name), model.get_parameter(name)), name


def test_a_group_that_stays_whole_after_all_keeps_its_bias() -> None:

    batches = data(6)
    program = fasp_fx.capture(_constants(), (batches[0],)).program
    config = PruningConfig(sparsity=0.5)
    analysis, decision = decide(program, config, batches)
    assert decision.weights.keys() == {"down.weight", "down.bias"}
    (group,) = decided(analysis, decision)
    assert restricted(analysis, decision, [group]).weights.keys() == {"down.weight", "down.bias"}
    assert not restricted(analysis, decision, []).weights
