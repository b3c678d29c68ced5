"""Losses after repair, greedy orders by them, and the gradients that weigh them: against dense solves and
gradients taken by hand.
"""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from models import linear, made, parameter
from torch import Tensor, nn

import fasp_fx
from fasp_fx.calibration import (
    ENOUGH,
    OBS,
    Columns,
    Consumers,
    Elimination,
    GroupColumns,
    InputGradients,
    Observation,
    Outputs,
    Ranks,
    TokenRoles,
    greedy,
    whole_batches,
)
from fasp_fx.calibration._consumers import _column_costs

DAMPING = 1e-2


def problem(seed: int, rows: int, sets: np.ndarray) -> tuple[Columns, Tensor, Tensor]:
    """A consumer with correlated inputs, F of its curvature Q = WᵀSW = FᵀF, and S."""
    generator = torch.Generator().manual_seed(seed)
    columns = len(sets)
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ torch.randn(
        columns, columns, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    spread = torch.randn(rows, rows, generator=generator, dtype=torch.float64)
    covariance = spread @ spread.T
    return Columns(weight, x.norm(dim=0), lambda: x.T @ x, sets), spread.T @ weight, covariance


def least_loss(columns: Columns, covariance: Tensor, removed: list[int]) -> float:
    """``½ min_V tr S (W − V) G (W − V)ᵀ`` over weights that are zero in the removed columns,
    solved densely.
    """
    assert columns.gram is not None
    gram = columns.gram()
    gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    kept = [column for column in range(len(gram)) if column not in removed]
    repaired = torch.zeros_like(columns.weight)
    if kept:
        repaired[:, kept] = torch.linalg.lstsq(gram[kept][:, kept], gram[kept] @ columns.weight.T).solution.T
    difference = columns.weight - repaired
    return 0.5 * float(torch.trace(covariance @ difference @ gram @ difference.T))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Channel sets of a consumer's columns, with their number and that of their blocks; some columns belong
    to none, some sets have several.
    """
    blocks, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    size = blocks * width
    extra = draw(st.lists(st.integers(-1, size - 1), max_size=6))
    return np.array(draw(st.permutations([*range(size), *extra])))[:, None], size, blocks


@given(layouts(), st.integers(0, 1000), st.data())
@settings(max_examples=60, deadline=None)
def test_a_loss_is_that_of_the_best_repair(
    layout: tuple[np.ndarray, int, int], seed: int, data: st.DataObject
) -> None:
    sets, size, _ = layout
    columns, root, covariance = problem(seed, 5, sets)
    alone = Elimination(columns, size, columns.gram(), root, DAMPING).losses(np.arange(size))
    for one in range(size):
        assert alone[one] == pytest.approx(
            least_loss(columns, covariance, np.flatnonzero(sets[:, 0] == one).tolist()), rel=1e-6
        )
    order = data.draw(st.permutations(range(size)))
    found, total = Elimination(columns, size, columns.gram(), root, DAMPING), 0.0
    for step, one in enumerate(order):
        expected = least_loss(
            columns, covariance, np.flatnonzero(np.isin(sets[:, 0], order[: step + 1])).tolist()
        )
        total += found.remove(np.array([one]))
        assert total == pytest.approx(expected, rel=1e-5, abs=1e-9)


@given(layouts(), st.integers(0, 1000), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_few_tokens_give_the_losses_of_their_gram_matrix(
    layout: tuple[np.ndarray, int, int], seed: int, large: bool, data: st.DataObject
) -> None:
    sets, size, _ = layout
    columns, root, covariance = problem(seed, 5, sets)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(sets) // 2, len(sets), generator=generator, dtype=torch.float64)
    x[:, 0] *= 1e3 if large else 1.0
    few = Columns(columns.weight, x.norm(dim=0), lambda: x.T @ x, sets, centred_gram=lambda: x)
    order = data.draw(st.permutations(range(size)))
    with mock.patch("fasp_fx.calibration._obs._FEWER", data.draw(st.sampled_from([1, 1000]))):
        found, total = Elimination(few, size, x, root, DAMPING), 0.0
    for step, one in enumerate(order):
        expected = least_loss(
            few, covariance, np.flatnonzero(np.isin(sets[:, 0], order[: step + 1])).tolist()
        )
        total += found.remove(np.array([one]))
        assert total == pytest.approx(expected, rel=1e-5, abs=1e-9)
    in_float32 = Elimination(few, size, x.float(), root.float(), DAMPING).losses(np.arange(size))
    for one in range(size):
        expected = least_loss(few, covariance, np.flatnonzero(sets[:, 0] == one).tolist())
        assert in_float32[one] == pytest.approx(expected, rel=1e-3, abs=1e-9)


@given(layouts(), st.integers(0, 1000), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_orders_are_nested_and_their_steps_add_up(
    layout: tuple[np.ndarray, int, int], seed: int, rounds: int
) -> None:
    sets, size, blocks = layout
    width = size // blocks
    problems = [problem(seed + index, 4, sets) for index in range(2)]

    def ordered(deepest: int) -> Any:
        view = GroupColumns(
            "group", np.arange(size) // width, [columns for columns, _, _ in problems], deepest
        )
        return greedy(
            view,
            [Elimination(columns, size, columns.gram(), root, DAMPING) for columns, root, _ in problems],
            rounds,
        )

    whole = ordered(width)
    for deepest in range(1, width + 1):
        part = ordered(deepest)
        steps = part.sets.shape[1]
        assert steps >= deepest
        assert (part.sets == whole.sets[:, :steps]).all()
        np.testing.assert_allclose(part.losses, whole.losses[: steps + 1])
        gone = np.flatnonzero(np.isin(sets[:, 0], part.sets)).tolist()
        expected = sum(least_loss(columns, covariance, gone) for columns, _, covariance in problems)
        assert part.losses[-1] == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("axes", [1, 4])
@pytest.mark.parametrize("large", [1.0, 1e4])
def test_rounding_is_no_loss_where_columns_are_alike(axes: int, large: float) -> None:
    """Some columns are copies of others, a few of these far larger than the rest: what is computed in float32
    is what float64 gives.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 96, generator=generator)
    x[:, :8] *= large
    x[:, 8:16], x[:, 40:60] = x[:, :8], x[:, 20:40]
    weight, sets = torch.randn(5, 96, generator=generator), np.arange(96)[:, None] // axes

    def losses(dtype: torch.dtype) -> np.ndarray:
        gram = x.T @ x
        columns = Columns(weight, x.norm(dim=0), lambda: gram.to(dtype), sets)
        count = 96 // axes
        found = OBS()(GroupColumns("group", np.zeros(count, dtype=np.int64), [columns], count)).losses
        assert found is not None
        return found

    np.testing.assert_allclose(losses(torch.float32), losses(torch.float64), rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("alive", [0, 6])
def test_rounding_of_columns_that_hardly_vary_is_no_curvature(alive: int) -> None:
    """Most columns are zero, and the means of the others take nearly all of them along, so that rounding of
    the products is larger than a hundredth of the mean of the diagonal.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(64, 400)
    x[:, :alive] = 1 + 1e-4 * torch.randn(64, alive, generator=generator)
    gram, sums = (x.T @ x).double(), x.double().sum(0)
    if alive:  # as products of float32 of columns that are next to zero can come out
        gram[-1, -2] = gram[-2, -1] = 1e-7 * float(gram.trace())
    columns = Columns(
        torch.randn(3, 400, generator=generator),
        gram.diagonal().sqrt(),
        gram.clone,
        np.arange(400)[:, None],
        centred_gram=lambda: gram - torch.outer(sums, sums) / (64 * 1.001),
    )
    problem = Elimination(
        columns, 400, columns.centred_gram(), OBS().root(columns, columns.centred_gram()), DAMPING
    )
    for costs in (problem.losses(np.arange(400)), _column_costs(columns)):
        assert np.isfinite(costs).all()
        assert (costs[:alive] > 0).all()
        assert (costs[alive:] == 0).all()


def _mixed() -> nn.Module:
    """A value that two consumers read, beside a residual path."""
    return made(
        lambda self, x: self.head(x + torch.tanh(self.left(h := torch.relu(self.up(x)))) * self.right(h)),
        **linear(up=(6, 10), left=(10, 6), right=(10, 6), head=(6, 4)),
    )


def squares(outputs: Any, inputs: Any) -> Tensor:
    """A loss of one's own."""
    return outputs.square().sum(-1).flatten()


def test_what_is_drawn_for_outputs_has_nothing_in_common() -> None:
    def drawn(seed: int, first: int, rows: int = 4, said: int = 4) -> list[Tensor]:
        loss, ones = Outputs(seed), torch.ones(rows, 500)
        loss.settle([ones, ones])
        loss.begin(first, said)
        return [row for output in loss([ones, ones], {}).reshape(2, rows, 500) for row in output]

    vectors = [
        *drawn(0, 0),
        *drawn(0, 4096),
        *drawn(1, 0),
        *drawn(2**40, 0),
        *drawn(0, 0, said=3),
        *drawn(0, 4096, said=3),
    ]
    alike = torch.corrcoef(torch.stack(vectors)) - torch.eye(len(vectors))
    assert float(alike.abs().max()) < 0.25
    torch.testing.assert_close(drawn(0, 2)[0], drawn(0, 0)[2])  # a sequence has its numbers wherever it comes


def test_gradients_are_those_at_each_consumer_alone() -> None:
    torch.manual_seed(0)
    model = _mixed()
    batches = [torch.randn(5, 3, 6) for _ in range(2)]
    analysis = fasp_fx.analyze(model, (batches[0],))
    consumers = Consumers(analysis, is_repaired=False)
    Observation(
        consumers,
        whole_batches(consumers.analysis.program, [[x] for x in batches]),
        TokenRoles(analysis.program, [[x] for x in batches], hold_out=False),
        {"gradients": InputGradients},
        squares,
        Ranks(),
    ).run(2, ENOUGH, lambda fraction: None)
    x = torch.cat(batches).flatten(0, 1)
    h = torch.relu(model.up(x))
    left, right = model.left(h), model.right(h)
    loss = squares(model.head(x + torch.tanh(left) * right), {}).sum()
    gradients = dict(zip(("left", "right"), torch.autograd.grad(loss, (left, right)), strict=True))
    seen = {consumer.weight: consumer for consumer in consumers.by_key.values()}
    assert set(seen) == {"left.weight", "right.weight"}
    for name, g in gradients.items():
        weight = model.get_submodule(name).weight.detach()  # type: ignore[union-attr,operator]
        statistic = seen[f"{name}.weight"].seen[0]["gradients"]
        assert isinstance(statistic, InputGradients)
        found = statistic.mean()
        assert found is not None
        torch.testing.assert_close(
            found.float(), weight.T @ (g.T @ g) @ weight / len(x) ** 2, rtol=1e-4, atol=1e-7
        )


def test_predicted_losses_come_true_where_the_loss_is_quadratic() -> None:
    """Of one consumer, with as many random combinations as it takes to average them out, what is predicted is
    what repair leaves.
    """
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5)).eval()
    data = [torch.randn(500, 8) for _ in range(8)]
    captured = fasp_fx.capture(model, (data[0],))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ROUNDS": 12, "SHRINKAGE": 0.0, "DAMPING": 1e-6}.items():
            patch.setattr(f"fasp_fx.calibration._obs.{name}", value)
        costs = fasp_fx.measure(captured, calibration=data, score="obs")
    result = fasp_fx.prune(
        captured, calibration=data, score="obs", allocation=lambda budget, *_: [4], sparsity=0.3
    )
    with torch.no_grad():
        dense, pruned = model(torch.cat(data)), result.module(torch.cat(data))
    error = 0.5 * float((dense - pruned).square().sum(-1).mean() / dense.square().mean()) / 5
    (curve,) = costs.values()
    assert curve.losses[4] == pytest.approx(error, rel=0.15)


def test_columns_that_name_a_channel_twice() -> None:
    """A weight contracted with one activation along two dimensions: column (i, i) goes with channel i."""
    torch.manual_seed(0)
    model = made(
        lambda self, x: self.down(torch.einsum("bi,bj,ijk->bk", h := self.up(x).tanh(), h, self.form)),
        up=nn.Linear(5, 8),
        down=nn.Linear(4, 3),
        form=parameter(8, 8, 4),
    )
    data = [torch.randn(64, 5) for _ in range(2)]
    result = fasp_fx.prune(model, (data[0],), calibration=data, sparsity=0.3)
    (group,) = (group for group in result.plan.groups if group.size == 8)
    costs = fasp_fx.measure(model, (data[0],), calibration=data)
    assert np.isfinite(costs[group.name].losses).all()
    assert (np.diff(costs[group.name].losses) >= 0).all()
