"""What the library returns is one short line where it is shown; the whole is for print() and fields."""

from __future__ import annotations

import torch
from torch import nn

import fasp_fx


def test_one_short_line() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4)).eval()
    data = [torch.randn(64, 16) for _ in range(4)]
    captured = fasp_fx.capture(model, (data[0],))
    costs = fasp_fx.measure(captured, calibration=data)
    result = fasp_fx.prune(captured, calibration=data, sparsity=0.5)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, result.module))
    sparsity = f"{result.report.sparsity:.4f}"
    assert repr(captured) == "Captured(programs={'': Program(6 weights, inputs=['input'])})"
    assert repr(fasp_fx.analyze(captured)) == "Analysis(2 frozen, 2 prunable)"
    assert repr(costs) == f"Costs(2 curves, score={costs.score!r})"
    assert repr(result) == f"Result(sparsity={sparsity}, parameters={before:,} -> {after:,})"
    assert repr(result.report) == f"Report(sparsity={sparsity}, parameters={before:,} -> {after:,})"
    assert repr(result.plan) == f"PruningPlan(2 groups, sparsity={sparsity})"
