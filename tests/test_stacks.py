"""Stacks of weights of which a model takes one by one are repaired, each matrix by itself; those that are
pruned exactly are in corpus/indices.py.
"""

from __future__ import annotations

import torch
from corpus.indices import COUNT, INNER, STEPS, stacked

import fasp_fx

ROWS = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))


def test_restoration_repairs_every_matrix_of_a_stack() -> None:
    torch.manual_seed(0)
    model = stacked(STEPS["linear"])
    restored = fasp_fx.prune(
        model, (ROWS,), calibration=[(ROWS,)], sparsity={"down": 0.3}, quality="fast", restore="least-squares"
    )
    cut = fasp_fx.apply(model, restored.plan, (ROWS,))
    (part,) = [part for group in restored.plan.groups for part in group.consumers if part.name == "down"]
    kept = [channel for channel in range(INNER) if channel not in part.removed]
    with torch.no_grad():
        x = model.first(ROWS)
        for expert in range(COUNT):
            inner = (x @ model.up[expert].t()).tanh()
            errors = [
                (inner[:, kept] @ result.module.down[expert].t() - inner @ model.down[expert].t()).norm()
                for result in (restored, cut)
            ]
            assert errors[0] < errors[1]
