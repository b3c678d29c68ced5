"""An operator of one's own, known by the one line of its rule: it is pruned, repaired with its bias, and its
multiply-accumulates are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import made
from torch import Tensor, nn

import fasp_fx
from fasp_fx.allocation import Macs, macs_of
from fasp_fx.patterns import Affine, affine, register, unregister


@torch.library.custom_op("fasp_fx_tests::affinely", mutates_args=())
def affinely(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x @ w + b


@affinely.register_fake
def _(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[1])


@torch.library.custom_op("fasp_fx_tests::scaled", mutates_args=())
def scaled(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x @ w * b


@scaled.register_fake
def _(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[1])


RULE = "x[... i], w[i o], b[o] -> [... o]"
AFFINELY, SCALED = torch.ops.fasp_fx_tests.affinely.default, torch.ops.fasp_fx_tests.scaled.default
BATCHES = [torch.randn(64, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]


@pytest.fixture(autouse=True)
def rules() -> Iterator[None]:
    for operator in (AFFINELY, SCALED):
        register(operator, RULE)
    yield
    for operator in (AFFINELY, SCALED):
        unregister(operator)


def model(operator: Any) -> nn.Module:
    """Every second neuron is always one, which a bias can stand for."""
    torch.manual_seed(0)
    weights = {"w": nn.Parameter(torch.randn(12, 4)), "b": nn.Parameter(torch.rand(4) + 0.5)}
    net: Any = made(lambda m, x: operator(torch.sigmoid(m.up(x)), m.w, m.b), up=nn.Linear(5, 12), **weights)
    with torch.no_grad():
        net.up.weight[::2] = 0
    return net.eval()


def test_a_bias_is_what_is_added_to_products_of_zeros() -> None:
    assert affine(AFFINELY) == Affine("b")
    assert affine(SCALED) is None
    assert affine(torch.ops.aten.addmm.default) == Affine("self")
    assert affine(torch.ops.aten.matmul.default) == Affine(None)
    assert affine(torch.ops.aten.conv_transpose2d.input) is None


def test_one_rule_is_all_that_is_known_of_an_operator() -> None:
    dense = model(AFFINELY)
    result = fasp_fx.prune(dense, (BATCHES[0],), calibration=BATCHES, budget=Macs(0.67), loss=None)
    (spent,) = result.report.budgets
    assert (spent.dense, spent.used) == (64 * (5 * 12 + 12 * 4), 64 * (5 * 8 + 8 * 4))
    assert dict(result.module.named_parameters())["w"].shape == (8, 4)
    (consumer,) = result.plan.groups[0].consumers
    assert set(consumer.removed) <= set(range(0, 12, 2))
    x = torch.randn(50, 5)
    with torch.no_grad():  # the bias was repaired, or what was constant would be missing
        assert torch.allclose(result.module(x), dense(x), atol=1e-2)


def test_what_is_no_bias_is_not_repaired_as_one() -> None:
    dense = model(SCALED)
    analysis = fasp_fx.analyze(dense, (BATCHES[0],))
    assert macs_of(analysis).whole == 64 * (5 * 12 + 12 * 4)
    result = fasp_fx.prune(dense, (BATCHES[0],), calibration=BATCHES, sparsity=0.3, loss=None)
    assert torch.equal(dict(result.module.named_parameters())["b"], dense.b)  # type: ignore[arg-type]
