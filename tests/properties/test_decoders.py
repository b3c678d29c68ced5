"""Mask-exactness over decoders drawn at random."""

from __future__ import annotations

import pytest
import torch
from captures import one_capture
from conftest import EXAMPLES, PROFILE
from decoders import Spec, build, specs, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import TOLERANCE, error, masked, removed_columns

import fasp_fx

_tried: list[Spec] = []


@pytest.fixture(scope="module", autouse=True)
def print_count(request: pytest.FixtureRequest) -> object:
    yield
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    text = f"mask-exactness was tried on {len(_tried)} drawn decoders ({len(set(_tried))} different ones)"
    print(text) if reporter is None else reporter.write_line(f"\n{text}")


@settings(max_examples=EXAMPLES if PROFILE == "slow" else 8)  # the models of the zoo are decoders too
@given(
    spec=specs(),
    share=st.floats(0.05, 1.0),
    batch=st.integers(1, 3),
    length=st.integers(2, 5),
    seed=st.integers(0, 99),
)
def test_mask_exact(spec: Spec, share: float, batch: int, length: int, seed: int) -> None:
    model, example = build(spec, seed), tokens(batch, length)
    with one_capture():
        most = fasp_fx.analyze(model, (example,)).max_sparsity
        assert most > 0, "the value channels of every decoder are prunable"
        result = fasp_fx.prune(model, (example,), sparsity=most * share, score="random", restore=None)
    removed = removed_columns(result.plan, model)
    for index, (other_batch, other_length) in enumerate(((batch + 1, length + 3), (1, length + 1))):
        unseen = tokens(other_batch, other_length, seed=index + 1)
        with torch.no_grad():
            with masked(model, removed):
                expected = model(unseen)
            found, dense = result.module(unseen), model(unseen)
        assert error(found, expected) <= TOLERANCE
        if removed:
            assert error(expected, dense) > TOLERANCE, "masking changes nothing that can be seen"
        else:
            assert error(found, dense) <= TOLERANCE
    _tried.append(spec)
