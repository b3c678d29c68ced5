"""On a CUDA device: statistics and results agree with those of the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import Spec, build, tokens
from oracle import TOLERANCE, error, masked, removed_columns

import fasp_fx
from fasp_fx.statistics import Gram

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine")]

SPEC = Spec(layers=2, hidden=8, kv_heads=2, repeat=2, head_dim=4, ffn=12, bias=True, gated=True, positions="rope")
BATCHES = [tokens(4, 9, seed=seed) for seed in range(4)]


@pytest.mark.parametrize("size", [64, 900])
def test_gram(size: int) -> None:
    data = torch.randn(500, size, generator=torch.Generator().manual_seed(0))
    on_cpu, on_cuda = Gram(size, torch.device("cpu")), Gram(size, torch.device("cuda"))
    on_cpu.update(data, -1)
    on_cuda.update(data.cuda(), -1)
    expected = on_cpu.symmetric()
    assert float((on_cuda.symmetric().cpu() - expected).abs().max() / expected.abs().max()) < 1e-3


@pytest.mark.parametrize("moved", [True, False], ids=["model on the device", "device argument"])
def test_restored_results_agree(moved: bool) -> None:
    model = build(SPEC)
    expected = fasp_fx.prune(model, (BATCHES[0],), calibration=BATCHES, sparsity=0.3)
    if moved:
        other = copy.deepcopy(model).cuda()
        batches = [batch.cuda() for batch in BATCHES]
        found = fasp_fx.prune(other, (batches[0],), calibration=batches, sparsity=0.3)
    else:
        found = fasp_fx.prune(model, (BATCHES[0],), calibration=BATCHES, sparsity=0.3, device="cuda")
        assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert all(parameter.device.type == "cuda" for parameter in found.module.parameters())
    assert found.plan.slices() == expected.plan.slices()
    unseen = tokens(3, 6)
    assert error(found.module(unseen.cuda()).cpu(), expected.module(unseen)) < 1e-2


def test_mask_exact() -> None:
    model = build(SPEC).cuda()
    result = fasp_fx.prune(model, (BATCHES[0].cuda(),), sparsity=0.4, score="random", restore=None)
    unseen = tokens(3, 6).cuda()
    with torch.no_grad(), masked(model, removed_columns(result.plan, model)):
        expected = model(unseen)
    assert error(result.module(unseen), expected) <= TOLERANCE
    assert error(result.module.cpu()(unseen.cpu()), expected.cpu()) <= 10 * TOLERANCE
