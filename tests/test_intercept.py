"""Repairs of consumers that add a bias: what goes had a mean, which the bias gives in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")


def data(width: int, count: int = 8, rows: int = 64) -> list[Tensor]:
    return [torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


class Constants(nn.Module):
    """A hidden layer of which every second neuron is the same, and not zero, whatever comes in."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 4, bias=bias)
        with torch.no_grad():
            self.up.weight[::2] = 0
            self.up.bias[::2] = torch.rand(6) + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def outputs_off(result: Any, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        dense = model(x)
        return float((result.module(x) - dense).norm() / dense.norm())


def test_what_is_constant_goes_at_no_cost_where_there_is_a_bias() -> None:
    batches = data(6)
    for quality in ("balanced", "best"):
        model = Constants().eval()
        result = fasp_fx.prune(model, (batches[0],), calibration=batches, sparsity=0.33, quality=quality)  # type: ignore[arg-type]
        assert len(result.plan.groups[0].consumers[0].removed) == 4
        assert set(result.plan.groups[0].consumers[0].removed) <= set(range(0, 12, 2))
        assert outputs_off(result, model, torch.randn(50, 6)) < 2e-3  # what the least of the ridges leaves


def test_without_a_bias_something_is_lost() -> None:
    model, batches = Constants(bias=False).eval(), data(6)
    result = fasp_fx.prune(model, (batches[0],), calibration=batches, sparsity=0.5)
    assert outputs_off(result, model, torch.randn(50, 6)) > 1e-2


@pytest.mark.parametrize("kind", ["conv", "grouped", "addmm"])
def test_every_operator_that_adds_a_bias(kind: str) -> None:
    """The output of the repaired consumer is as near to the dense one's as a least-squares solve
    brings it.
    """

    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            groups = 2 if kind == "grouped" else 1
            self.up, self.down = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 4, 3, padding=1, groups=groups)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.sigmoid(self.up(x)))

    class Addmm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up = nn.Linear(3, 8)
            self.weight, self.bias = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, torch.sigmoid(self.up(x)), self.weight)

    model = (Addmm() if kind == "addmm" else Conv()).eval()
    x = torch.randn(2000, 3) if kind == "addmm" else torch.randn(400, 3, 10)
    found = fasp_fx.prune(model, (x[:4],), calibration=list(x.chunk(8)), sparsity=0.3)
    with torch.no_grad():
        hidden = torch.sigmoid(
            (nn.functional.linear if kind == "addmm" else nn.functional.conv1d)(
                x, *(found.module.get_parameter(f"up.{name}") for name in ("weight", "bias"))
            )
        )
        if kind != "addmm":
            # [positions, columns].
            hidden = (
                nn.functional.unfold(hidden[:, :, None], (1, 3), padding=(0, 1)).movedim(1, -1).flatten(0, 1)
            )
        dense, pruned = (
            module(x) if kind == "addmm" else module(x).movedim(1, -1).flatten(0, 1)
            for module in (model, found.module)
        )
        assert hidden.shape[1] < (8 if kind == "addmm" else 24)
        groups = 2 if kind == "grouped" else 1
        for own, target, got in zip(
            *(tensor.double().chunk(groups, -1) for tensor in (hidden, dense, pruned)), strict=True
        ):
            beside = torch.cat([own, own.new_ones(len(own), 1)], 1)
            least, without = (
                (basis @ torch.linalg.lstsq(basis, target).solution - target).norm()
                for basis in (beside, own)
            )
            assert (got - target).norm() < 1.05 * least + 1e-3 * target.norm()
            assert kind != "conv" or (got - target).norm() < without, (
                "the bias brings nothing that can be seen"
            )


class Shared(nn.Module):
    """Two consumers that add one bias, and one that scales its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.middle = nn.Linear(6, 12), nn.Linear(6, 12)
        self.first, self.second = nn.Parameter(torch.randn(6, 12)), nn.Parameter(torch.randn(6, 12))
        self.third = nn.Parameter(torch.randn(12, 6))
        self.both, self.scaled = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.last = nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = x + nn.functional.linear(torch.sigmoid(self.up(x)), self.first, self.both)
        h = h + nn.functional.linear(torch.sigmoid(self.middle(h)), self.second, self.both)
        return torch.addmm(self.scaled, torch.sigmoid(self.last(h)), self.third, beta=0.5)


def test_a_bias_that_is_read_elsewhere_or_scaled_stays_as_it_is() -> None:
    model, batches = Shared().eval(), data(6)
    result = fasp_fx.prune(model, (batches[0],), calibration=batches, sparsity=0.4)
    assert {group.consumers[0].name for group in result.plan.groups} == {"first", "second", "third"}
    for name in ("both", "scaled"):
        assert torch.equal(result.module.get_parameter(name), model.get_parameter(name)), name


def test_without_restoration_biases_stay_as_they_are() -> None:
    model, batches = Constants().eval(), data(6)
    result = fasp_fx.prune(model, (batches[0],), calibration=batches, sparsity=0.5, restore=None)
    assert torch.equal(result.module.get_parameter("down.bias"), model.down.bias)


def test_a_group_that_stays_whole_after_all_keeps_its_bias() -> None:
    from deciding import decide
    from fasp_fx.config import PruningConfig

    from fasp_fx.calibration._visit import decided
    from fasp_fx.pruning.check import restricted

    batches = data(6)
    program = fasp_fx.capture(Constants().eval(), (batches[0],)).program
    config = PruningConfig(sparsity=0.5)
    analysis, decision = decide(program, config, batches)
    assert decision.weights.keys() == {"down.weight", "down.bias"}
    (group,) = decided(analysis, decision)
    assert restricted(analysis, decision, [group]).weights.keys() == {"down.weight", "down.bias"}
    assert not restricted(analysis, decision, []).weights
