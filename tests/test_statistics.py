"""Gram matrices, scores and restoration against naive computations in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import fasp_fx
from fasp_fx.calibration import GroupColumns, GroupScore, Order, SplitGram, is_few, whole
from fasp_fx.calibration._statistics import FEW, HELD, PADDING


def net() -> nn.Module:
    """Two coupled groups in a row."""
    torch.manual_seed(3)
    layers = (nn.Linear(10, 48), nn.ReLU(), nn.Linear(48, 40), nn.SiLU(), nn.Linear(40, 5))
    return nn.Sequential(*layers).eval()


def data(batches: int = 3, tokens: int = 90) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(tokens, 10, generator=generator) for _ in range(batches)]


@given(
    tokens=st.integers(1, 40),
    columns=st.integers(1, 900),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_a_gram_leaves_padding_out_and_adds_up_to_the_rest(
    tokens: int, columns: int, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gram = SplitGram(columns, torch.device("cpu"))
    parts = [torch.randn(tokens, columns, generator=generator).to(dtype) for _ in range(3)]
    marks = [torch.randint(0, 3, (tokens,), generator=generator) for _ in range(3)]
    for part, own in zip(parts, marks, strict=True):
        gram.update(part, own)
    flat, kinds = torch.cat(parts).double(), torch.cat(marks)
    counted, held = flat[kinds != PADDING], flat[kinds == HELD]
    products = (counted.T @ counted).float()
    torch.testing.assert_close(whole(gram.total()), products, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gram.norms(), counted.norm(dim=0), rtol=1e-5, atol=1e-5)
    assert gram.tokens == len(counted)
    torch.testing.assert_close(whole(gram.held.compact()), (held.T @ held).float(), rtol=1e-5, atol=1e-4)
    assert len(gram.parts) == 1 + bool(len(held))
    if FEW * len(flat) <= columns:  # X itself is kept, and nothing of the size of a Gram matrix
        assert all(is_few(part.compact()) for part in gram.parts)


def test_the_type_that_torch_gives_numbers_plays_no_part() -> None:
    model, batches = net(), data(tokens=FEW)
    first = fasp_fx.measure(model, (batches[0],), calibration=batches, score="obs")
    torch.set_default_dtype(torch.float64)
    try:
        again = fasp_fx.measure(model, (batches[0],), calibration=batches, score="obs")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(np.array_equal(again[name].losses, curve.losses) for name, curve in first.items())


class Kept:
    """A statistic that keeps nothing."""

    needs_gradient = True

    def __init__(self, columns: int, device: torch.device) -> None:
        pass

    def update(self, tokens: Tensor, gradient: Tensor | None, weight: Tensor) -> None:
        pass


class Writing(Kept):
    """The same, and writes into all that it is given."""

    def update(self, tokens: Tensor, gradient: Tensor | None, weight: Tensor) -> None:
        for tensor in (tokens, gradient, weight):
            if tensor is not None:
                tensor.zero_()


class InOrder(GroupScore):
    """Takes the channel sets as they come; may write into the weights that it is given."""

    def __init__(self, statistic: Any, writes: bool) -> None:
        self.statistics, self.writes = {"own": statistic}, writes  # type: ignore[misc]

    def __call__(self, group: GroupColumns) -> Order:
        for columns in group.consumers if self.writes else ():
            columns.weight.zero_()
        return Order(np.stack(list(group.members)))


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_scores_and_statistics_may_write_into_what_they_are_given(allocation: str) -> None:
    model, batches = net(), data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (
        fasp_fx.prune(
            model,
            (batches[0],),
            calibration=batches,
            sparsity=0.3,
            allocation=allocation,  # type: ignore[arg-type]
            score=score,
        )
        for score in (InOrder(Kept, False), InOrder(Writing, True))
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(map(torch.equal, batches, data()))
    assert first.plan.groups == second.plan.groups
    for weight, other in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(weight, other)


@pytest.mark.parametrize(
    ("score", "says"),
    [
        (lambda columns: torch.empty(columns.weight.shape[1], device="meta"), "a dense tensor"),
        (lambda columns: columns.norms.to_sparse(), "a dense tensor"),
        (lambda columns: columns.norms * 1j, "a dense tensor of real numbers"),
    ],
    ids=["meta", "sparse", "complex"],
)
def test_scores_that_cannot_be_are_refused(score: Any, says: str) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=says):
        fasp_fx.prune(net(), (data()[0],), calibration=data(), sparsity=0.3, score=score)
