"""Models that write into their inputs: what they compute of a batch does not depend on who ran it before, and
the caller's tensors stay as they are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import made
from torch import Tensor, nn

import fasp_fx
from fasp_fx.testing import check_program

pytestmark = pytest.mark.usefixtures("shared_captures")


def _shifted(in_place: bool) -> nn.Module:
    """Begins by moving its input, in its place or beside it, which is the same function."""
    layers = (nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 4))
    return made(
        lambda self, x: self.layers(x.sub_(self.shift).mul_(3.0) if in_place else (x - self.shift) * 3.0),
        layers=nn.Sequential(*layers),
        shift=torch.ones(()),
    )


def _pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    written, beside = _shifted(True), _shifted(False)
    beside.load_state_dict(written.state_dict())
    return written, beside


def _batches(count: int = 8, rows: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 6, generator=generator) for _ in range(count)]


OPTIONS: dict[str, dict[str, Any]] = {"best": {"quality": "best"}, "search": {"allocation": "search"}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_pruned_as_the_model_that_writes_nothing(options: dict[str, Any]) -> None:
    plans, weights = [], []
    for model in _pair():
        batches = _batches()
        result = fasp_fx.prune(model, (_batches()[0],), calibration=batches, sparsity=0.4, **options)
        assert all(map(torch.equal, batches, _batches())), "the caller's batches changed"
        plans.append(result.plan.groups)
        weights.append(dict(result.module.named_parameters()))
    assert plans[0] == plans[1]
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, msg=name)


def test_distilled_as_the_model_that_writes_nothing() -> None:
    found = []
    for model in _pair():
        result = fasp_fx.prune(model, (_batches()[0],), calibration=_batches(), sparsity=0.5, quality="fast")
        batches = _batches(16)
        trained = fasp_fx.distil(result, model, batches, epochs=2, learning_rate=3e-3)
        assert all(map(torch.equal, batches, _batches(16))), "the caller's batches changed"
        assert trained.report.recovery is not None
        found.append([point.held_out for point in trained.report.recovery.curve])
    assert found[0] == pytest.approx(found[1])
    assert found[0][-1] < found[0][0]


def test_every_invariant_holds() -> None:
    example, before = _batches(1, 5)[0], _batches(1, 5)[0]
    check_program(_shifted(True), (example,), invariants=("mask-exact", "nothing", "restored", "alone"))
    assert torch.equal(example, before)
