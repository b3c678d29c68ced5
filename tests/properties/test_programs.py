"""Whole programs drawn at random, of every kind and combined: each is pruned and held against the masked
dense module.
"""

import pytest
import torch
from conftest import PROFILE
from hypothesis import event, given, settings, strategies as st

from fasp_fx.testing import build, check_program, example, programs
from fasp_fx.testing.specs import Net
from fasp_fx.testing.strategies import FAMILIES

SLOW = PROFILE == "slow"
#: programs of all kinds combined, programs of each family, and programs on which every invariant is checked:
#: over 3,000 in the slow profile
COMBINED, EACH, EVERY = (1500, 120, 60) if SLOW else (6, 1, 1)
DTYPES = st.sampled_from([torch.float64, torch.float32])


def mask_exact(
    net: Net, seed: int, dtype: torch.dtype, share: float | None, also: tuple[str, ...] = ()
) -> None:
    """Prune what was drawn and compare."""
    model, inputs = build(net, seed, dtype), example(net, 2, seed, dtype)
    verdict = check_program(model, inputs, seed=seed, sparsity=share, invariants=("mask-exact", *also))
    event(f"{'something' if verdict.removed else 'nothing'} removed")
    event(f"masking {'shows' if verdict.seen > 1e-4 else 'does not show'}")


@settings(max_examples=COMBINED)
@given(net=programs(), seed=st.integers(0, 999), dtype=DTYPES)
def test_mask_exact(net: Net, seed: int, dtype: torch.dtype) -> None:
    mask_exact(net, seed, dtype, None)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=EACH)
@given(data=st.data(), seed=st.integers(0, 999), dtype=DTYPES)
def test_families_are_mask_exact(family: str, data: st.DataObject, seed: int, dtype: torch.dtype) -> None:
    mask_exact(data.draw(FAMILIES[family]()), seed, dtype, None, ("steps",) if seed % 4 == 0 else ())


@settings(max_examples=EVERY)
@given(net=programs(), seed=st.integers(0, 999), dtype=DTYPES)
def test_every_invariant(net: Net, seed: int, dtype: torch.dtype) -> None:
    check_program(build(net, seed, dtype), example(net, 2, seed, dtype), seed=seed)
