"""Cost curves and one threshold for all groups; scores, allocations and statistics of one's own, as a user
writes them.
"""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import PROFILE
from hypothesis import assume, given, settings, strategies as st
from models import block, made, two_layers, wide
from torch import Tensor, nn

import fasp_fx
from fasp_fx.allocation import Budget, Bytes, Global, Limit, Macs, Parameters
from fasp_fx.analysis import Group, Resource, Sparsity
from fasp_fx.calibration import (
    Columns,
    GroupColumns,
    GroupScore,
    InputGradients,
    MakeStatistic,
    Order,
    by_set,
    by_value,
)
from fasp_fx.testing import build, example, programs
from fasp_fx.testing.specs import Net

DATA = [torch.randn(30, 8, generator=torch.Generator().manual_seed(index)) for index in range(8)]


def deep() -> nn.Module:
    """Three hidden layers, of which the second matters least: a small factor follows it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        for layer, factor in zip(m.layers, (1.0, 0.01, 1.0), strict=True):
            x = x + factor * layer(x)
        return x

    torch.manual_seed(0)
    layers = (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3))
    return made(forward, layers=nn.ModuleList(layers))


class Taylor(GroupScore):
    """The first-order change of the loss: ``√(Q_jj)·‖X_j‖``, of all consumers."""

    statistics: ClassVar[Mapping[str, MakeStatistic]] = {"gradients": InputGradients}

    def __call__(self, group: GroupColumns) -> Order:
        def values(columns: Columns) -> np.ndarray:
            gradients = columns.seen["gradients"]
            assert isinstance(gradients, InputGradients)
            assert columns.norms is not None
            mean = gradients.mean()
            assert mean is not None
            return (mean.diagonal().sqrt() * columns.norms).numpy()

        return by_value(group, by_set(group, values))


class Linear(Resource):
    """Groups whose channel sets take a fixed share of the weights along."""

    def __init__(self, widths: list[int], shares: list[int]) -> None:
        groups = [Group(str(index), width, 1, "prunable", "", (), ()) for index, width in enumerate(widths)]
        super().__init__(groups, sum(width * share for width, share in zip(widths, shares, strict=True)))
        self.shares = shares

    def used(self, lost: Any) -> float:
        return self.whole - sum(count * share for count, share in zip(lost, self.shares, strict=True))


@st.composite
def problems(
    draw: st.DrawFn, groups: int = 5, width: tuple[int, int] = (2, 12), resources: tuple[int, ...] = (0, 1, 2)
) -> tuple[Budget, int, fasp_fx.Costs]:
    """A budget that can be met, ``round_to``, and convex cost curves.

    Args:
        groups: how many there are at most.
        width: how wide they are.
        resources: how many are limited; of none a target is to be met.
    """
    widths = draw(st.lists(st.integers(*width), min_size=1, max_size=groups))
    round_to, limited = draw(st.integers(1, 3)), draw(st.sampled_from(resources))
    counted = [Linear(widths, [draw(st.integers(1, 4)) for _ in widths]) for _ in range(max(limited, 1))]
    reach = min(resource.reach(round_to) for resource in counted)
    assume(reach > 0.1)
    sparsity = draw(st.floats(0.05, reach - 0.01))
    pairs = zip((Parameters, Macs, Bytes), counted)
    limits = [Limit.under(cap(1 - sparsity), resource) for cap, resource in pairs]
    budget = Budget(counted[0].groups, limits if limited else [Limit(counted[0], sparsity)])
    losses = [sorted(draw(st.lists(st.floats(0.01, 10), min_size=size, max_size=size))) for size in widths]
    curves = {
        str(index): fasp_fx.CostCurve(np.array([0.0, *np.cumsum(own)])) for index, own in enumerate(losses)
    }
    return budget, round_to, fasp_fx.Costs(curves, "")


@given(problems(3, (2, 6), (0,)))
@settings(max_examples=60, deadline=None)
def test_no_other_allocation_of_convex_costs_is_better(problem: tuple[Budget, int, fasp_fx.Costs]) -> None:
    budget, _, costs = problem
    (limit,), lost = budget.limits, Global()(budget, 1, costs)
    counted: Any = limit.resource
    spent, reached = costs.predicted(dict(zip(costs, lost, strict=True))), counted.removed(lost)
    assert abs(reached - limit.need) <= max(counted.shares) / counted.whole / 2 + 1e-9
    for other in product(*(range(group.deepest_loss + 1) for group in counted.groups)):
        if counted.removed(other) >= reached - 1e-12:
            step = max(
                curve.losses[count] - curve.losses[max(count - 1, 0)]
                for curve, count in zip(costs.values(), lost, strict=True)
            )
            least = costs.predicted(dict(zip(costs, other, strict=True)))
            assert spent <= least + step * max(counted.shares) + 1e-9, (
                "more than a last step that is not taken whole is lost"
            )


@pytest.mark.parametrize("score", ["obs", "fasp", "magnitude", Taylor()])
def test_what_matters_least_loses_most(score: Any) -> None:
    asked: dict[str, Any] = {"calibration": DATA, "allocation": "global", "sparsity": 0.3}
    result = fasp_fx.prune(deep(), (DATA[0],), score=score, **asked)
    removed = {group.name: group.removed_sets for group in result.plan.groups}
    assert removed["layers.1.2.weight"] >= 12
    assert abs(result.report.sparsity - 0.3) < 0.02


@pytest.mark.parametrize("loss", [True, False])
def test_a_score_of_columns_costs_what_lies_between_unrepaired_and_repaired(loss: bool) -> None:
    """By autograd on the dense model and a dense inverse: ½ Q_jj √(G_jj / [G⁻¹]_jj), Q of gradients, or of
    relative errors of the output without a loss.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4, bias=False)).eval()

    def squares(outputs: Any, inputs: Any) -> Tensor:
        return (outputs.square() / 2).flatten()

    costs = fasp_fx.measure(model, (DATA[0],), calibration=DATA, score="fasp", loss=squares if loss else None)
    assert costs.score == "fasp"
    weight = model[2].weight.detach().double()
    x = model[:2](torch.cat(DATA)).detach().double().requires_grad_(True)
    terms = squares(x @ weight.T, {})
    terms.sum().backward()
    assert x.grad is not None
    gram = (x.T @ x).detach()
    energies = gram.diagonal()
    inverse = torch.linalg.inv(gram + 0.01 * energies.mean() * torch.eye(16, dtype=torch.float64)).diagonal()
    own = weight.square().sum(0)
    curvature = x.grad.square().sum(0) / len(x) / terms.numel() if loss else own / (own * energies).sum()
    each = curvature / 2 * (energies / inverse).sqrt()
    order = (weight.abs().sum(0) * energies.sqrt()).argsort()
    expected = torch.cat([torch.zeros(1, dtype=torch.float64), each[order].cumsum(0)])
    found = costs["2.weight"].losses
    assert found == pytest.approx(expected[: len(found)].numpy(), rel=1e-3)


def test_curves_serve_several_sparsities_and_are_saved(tmp_path: Path) -> None:
    captured = fasp_fx.capture(deep(), (DATA[0],))
    # What is measured of eight where no curves are given.
    costs = fasp_fx.measure(captured, calibration=DATA[:2], score="obs")
    costs.save(tmp_path / "costs.json")
    again = fasp_fx.Costs.load(tmp_path / "costs.json")
    before: dict[str, int] = {}
    for sparsity in (0.1, 0.3, 0.5):
        options: dict[str, Any] = {
            "calibration": DATA,
            "score": "obs",
            "allocation": "global",
            "sparsity": sparsity,
        }
        given, own = fasp_fx.prune(captured, costs=again, **options), fasp_fx.prune(captured, **options)
        assert given.plan == own.plan
        removed = {group.name: group.removed_sets for group in given.plan.groups}
        assert all(removed.get(name, 0) >= count for name, count in before.items())
        before = removed


def test_a_model_that_compares_samples_is_measured_on_whole_batches() -> None:
    """One by one they have nothing to say."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = block(m, x)
        return h[0::2] - h[1::2]

    torch.manual_seed(0)
    model, batches = wide(forward, 8, 16), [torch.randn(64, 8) for _ in range(4)]
    result = fasp_fx.prune(model, (batches[0],), calibration=batches, sparsity=0.3)
    assert "half the squared error" in str(result.report.prediction)


def test_a_callable_decides() -> None:
    seen: list[tuple[int, float, int]] = []

    def allocate(budget: Budget, round_to: int | None) -> list[int]:
        seen.append((budget.groups[0].width, budget.over([0]), round_to))
        return [7 for _ in budget.groups]

    result = fasp_fx.prune(
        two_layers().eval(),
        (torch.randn(2, 12),),
        allocation=allocate,
        sparsity=0.4,
        round_to=2,
        score="magnitude",
        restore=None,
    )
    assert (seen, result.plan.groups[0].removed_sets) == ([(20, 0.4, 2)] * len(seen), 7)
    assert result.report.notes == ()


# Bad input.


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            lambda outputs, inputs: outputs.sum() * float("nan"),
            fasp_fx.CalibrationError,
            "the loss is not finite on calibration batch 0",
        ),
        (lambda outputs, inputs: torch.ones(3), fasp_fx.CalibrationError, "vanish"),
        (lambda outputs, inputs: 0 * outputs.sum(), fasp_fx.CalibrationError, "vanish"),
        (
            lambda outputs, inputs: (0 * outputs).sqrt().sum(),
            fasp_fx.CalibrationError,
            "gradients of the loss are not finite",
        ),
        (lambda outputs, inputs: 1.0, fasp_fx.CalibrationError, "returned a float"),
        (
            lambda outputs, inputs: (outputs > 0).sum(),
            fasp_fx.CalibrationError,
            "returned a torch.int64",
        ),
        (
            lambda outputs, inputs: outputs.reshape(7, 11),
            fasp_fx.CalibrationError,
            "the loss fails on calibration batch 0: ",
        ),
        ("next-token", fasp_fx.CalibrationError, r"needs integers \[batch, tokens\]"),
        ("next_token", fasp_fx.ArgumentError, "loss='next_token' is not known; use 'auto', 'outputs'"),
    ],
)
def test_a_loss_that_does_not_serve_is_refused(loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fasp_fx.prune(deep(), (DATA[0],), calibration=DATA, allocation="global", loss=loss)


def test_costs_that_do_not_serve_are_refused(tmp_path: Path) -> None:
    captured = fasp_fx.capture(deep(), (DATA[0],))
    costs = fasp_fx.measure(captured, calibration=DATA[:1])
    other = deep()
    other.layers[0][0].weight.detach().mul_(2)  # type: ignore[index,union-attr]
    with pytest.raises(fasp_fx.ArgumentError, match="curves are of another model"):
        fasp_fx.prune(other, (DATA[0],), calibration=DATA, allocation="global", costs=costs)
    with pytest.raises(fasp_fx.ArgumentError, match="costs is a dict"):
        fasp_fx.prune(captured, calibration=DATA, allocation="global", costs={})  # type: ignore[arg-type]
    for text in (
        "",
        "[]",
        '{"format": "fasp_fx.document/1", "kind": "costs"}',
        costs.to_json().replace("document/1", "document/0"),
        costs.to_json().replace("[0.0,", "[1.0,"),
    ):
        (tmp_path / "costs.json").write_text(text)
        with pytest.raises(fasp_fx.ArgumentError, match=r"the costs is|a cost curve holds"):
            fasp_fx.Costs.load(tmp_path / "costs.json")
    with pytest.raises(fasp_fx.ArgumentError, match="cannot be read"):
        fasp_fx.Costs.load(tmp_path / "nothing.json")


def _small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3)).eval()


ORDERS = [
    np.zeros((1, 10)),
    np.arange(10.0)[None],
    np.arange(10)[None, :3],
    np.arange(10),
    np.arange(10, 20)[None],
]
LOSSES = [3.0, np.zeros((11, 2)), np.arange(10)]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        *((Order(order), r"no order of '2\.weight'") for order in ORDERS),
        *((Order(np.arange(10)[None], losses), "as losses None, or one finite") for losses in LOSSES),
    ],
)
def test_a_score_that_returns_no_order_is_refused(returned: Any, said: str) -> None:
    wrong = type("Wrong", (GroupScore,), {"__call__": lambda self, group: returned})
    with pytest.raises(fasp_fx.ArgumentError, match=said):
        fasp_fx.prune(_small(), (DATA[0],), calibration=DATA, score=wrong(), sparsity=0.5)


def test_curves_are_of_the_score_that_a_key_says() -> None:
    captured = fasp_fx.capture(_small(), (DATA[0],))
    score: Any = lambda columns: columns.norms  # noqa: E731
    asked: dict[str, Any] = {"calibration": DATA, "score": score}
    unknown = fasp_fx.measure(captured, **asked)
    score.key = "norms"
    costs = fasp_fx.Costs.from_json(fasp_fx.measure(captured, **asked).to_json())
    asked |= {"sparsity": 0.3, "allocation": "global"}
    expected = fasp_fx.prune(captured, **asked).plan
    assert fasp_fx.prune(captured, costs=costs, **asked).plan == expected
    score.key = "squares"
    with pytest.raises(fasp_fx.ArgumentError, match="the cost curves are of score="):
        fasp_fx.prune(captured, costs=costs, **asked)
    del score.key
    for measured in (costs, unknown):
        with pytest.raises(fasp_fx.ArgumentError, match=r"cannot tell whether it is the same.* key"):
            fasp_fx.prune(captured, costs=measured, **asked)


@given(programs(), st.integers(0, 1000))
@settings(max_examples=15 if PROFILE == "slow" else 3, deadline=None)
@pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning")
def test_whatever_is_drawn_is_chosen_by_predicted_losses(net: Net, number: int) -> None:
    """Warnings are errors here: nothing that was chosen may have to stay whole."""
    args = example(net, 2, number, torch.float64)
    captured = fasp_fx.capture(build(net, number, torch.float64), args)
    analysis = fasp_fx.analyze(captured)
    assume(analysis.max_sparsity > 0.01)
    batches = [example(net, 3, number + index, torch.float64) for index in range(3)]
    sparsity = 0.5 * analysis.max_sparsity
    for loss in ("auto", None):
        costs = fasp_fx.measure(captured, calibration=batches, loss=loss)  # type: ignore[arg-type]
        counted = Sparsity(analysis)
        lost = Global()(Budget(counted.groups, [Limit(counted, sparsity)]), 1, costs)
        assert costs.predicted(dict(zip((group.name for group in analysis.chosen), lost, strict=True))) >= 0
        result = fasp_fx.prune(captured, calibration=batches, sparsity=sparsity, loss=loss, costs=costs)  # type: ignore[arg-type]
        removed = {group.name: group.removed_sets for group in result.plan.groups}
        expected = {
            group.name: count * group.blocks
            for group, count in zip(analysis.chosen, lost, strict=True)
            if count
        }
        assert removed == expected
