"""How far apart outputs are: entries that stand for "masked" do not hide what is wrong with the others."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st
from models import block, wide
from torch import Tensor, nn

import fasp_fx
from fasp_fx.base import deviation, distance

FILLINGS = (-1e9, torch.finfo(torch.float32).min, -65504.0)


def _scores() -> Tensor:
    return torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) + 0.1


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("filling", FILLINGS)
def test_fillings_hide_nothing(filling: float, added: bool) -> None:
    expected = _scores()
    expected[1, :5] = expected[1, :5] + filling if added else filling
    assert deviation(expected.clone(), expected) == distance(expected.clone(), expected) == 0
    found = expected.clone()
    found[0, 3] += 0.4
    assert deviation(found, expected) > 0.4 / float(_scores().max()) - 1e-6
    assert distance(found, expected) > 0.1
    found[1, 0] *= 0.99  # and a filling that is wrong is seen as well
    assert deviation(found, expected) > 0.4 / float(_scores().max()) - 1e-6
    found[0, 3] = expected[0, 3]
    assert 0.005 < deviation(found, expected) < 0.02


@given(st.integers(0, 2**32), st.floats(1e-6, 1e6), st.floats(1e-9, 1e-2))
def test_without_fillings_it_is_relative_to_the_largest(seed: int, scale: float, error: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected = (torch.rand(64, generator=generator, dtype=torch.float64) + 0.01) * scale
    found = expected * (1 + error * (torch.rand(64, generator=generator, dtype=torch.float64) - 0.5))
    wanted = float((found - expected).abs().max() / expected.abs().max())
    assert math.isclose(deviation(found, expected), wanted, rel_tol=1e-9)


def test_the_check_sees_what_is_wrong_beside_masked_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight is spoilt after everything was decided, which the run on the example has to notice."""
    from fasp_fx.pruning import check as _check

    torch.manual_seed(0)
    model = wide(lambda m, x, mask: block(m, x).masked_fill(mask, -1e9), down=nn.Linear(24, 4))
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 0] = True
    finish = _check.finish

    def spoilt(program: object, *args: object, **kwargs: object) -> object:
        module = finish(program, *args, **kwargs)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
        return module

    monkeypatch.setattr(_check, "finish", spoilt)
    with pytest.raises(fasp_fx.FaspError, match="differ"):
        fasp_fx.prune(model, (torch.randn(2, 6), mask), score="magnitude", restore=None, sparsity=0.3)


def test_an_entry_that_differs_alone_is_held_against_the_others() -> None:
    expected = torch.tensor([1.0, 0.5, -0.7, 0.01]).bfloat16()
    found = torch.tensor([1.0, 0.5, -0.7, 0.012]).bfloat16()
    assert deviation(found, expected) < 0.003
    assert distance(found, expected) < 0.003
    assert deviation(torch.tensor([1.0, 1e-8]), torch.tensor([1.0, 0.0])) < 1e-7
