"""Several prunings of one captured generating model, and plans that are carried out again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import ZOO

import fasp_fx
from fasp_fx import hf

TOKENS = [torch.randint(0, 96, (4, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


@pytest.fixture(scope="module")
def captured() -> hf.CapturedModel:
    return hf.capture(ZOO["llama_gqa"].build())


@pytest.mark.slow
def test_prunings_share_a_capture_and_its_costs(captured: hf.CapturedModel) -> None:
    model = ZOO["llama_gqa"].build()
    costs = hf.measure(captured, calibration=TOKENS)
    assert costs.keys() == {group.name for group in hf.analyze(captured).chosen}
    how: dict[str, Any] = {"calibration": TOKENS, "costs": costs}
    first, found = (hf.prune(captured, sparsity=sparsity, **how) for sparsity in (0.2, 0.4))
    assert first.report.sparsity < found.report.sparsity
    expected = hf.prune(model, sparsity=0.4, **how)
    assert found.plan == expected.plan
    for name, tensor in found.model.state_dict().items():
        torch.testing.assert_close(tensor, expected.model.state_dict()[name])


def test_a_plan_is_carried_out_again(captured: hf.CapturedModel) -> None:
    repaired = hf.prune(captured, calibration=TOKENS, sparsity=0.3, quality="fast")
    plain = hf.apply(captured, repaired.plan)
    again = hf.apply(captured, repaired.plan, calibration=TOKENS)
    assert plain.plan.groups == again.plan.groups == repaired.plan.groups
    ids, dense = TOKENS[0], captured.model(TOKENS[0]).logits
    cut, best, same = (((one.model(ids).logits - dense).norm()) for one in (plain, repaired, again))
    assert best < cut
    torch.testing.assert_close(same, best, rtol=0.05, atol=0)
    assert torch.equal(plain.model.generate(ids[:1], max_new_tokens=4, do_sample=False)[:, :12], ids[:1])


def test_weights_that_changed_are_refused(captured: hf.CapturedModel) -> None:
    fresh = hf.capture(ZOO["llama_gqa"].build())
    with torch.no_grad():
        fresh.model.lm_head.weight.mul_(2)
    with pytest.raises(fasp_fx.ArgumentError, match="has changed since the model was captured"):
        hf.prune(fresh, calibration=TOKENS, sparsity=0.3)
