"""Recurrent layers are restored; those that are pruned exactly are in corpus/layers.py."""

from __future__ import annotations

import torch
from corpus.layers import recurrent
from models import randomise

import fasp_fx


def test_recurrent_layers_are_restored() -> None:
    model = randomise(recurrent("LSTM", num_layers=2, bidirectional=True), std=0.7)
    x = torch.randn(200, 4, 3, generator=torch.Generator().manual_seed(0))
    result = fasp_fx.prune(model, (x[:2],), calibration=[x], sparsity=0.35)
    cut = fasp_fx.apply(model, result.plan, (x[:2],))
    with torch.no_grad():
        repaired, left = ((one.module(x) - model(x)).norm() for one in (result, cut))
    assert repaired < left
