"""Convolutions: scored and restored by their windows. Exact ones are in corpus/layers.py."""

from __future__ import annotations

import torch
from corpus.layers import CONVOLUTIONS
from models import randomise
from torch import nn

import fasp_fx


def test_a_transposed_convolution_in_groups_is_repaired() -> None:
    model = randomise(CONVOLUTIONS["transposed grouped"](), std=0.4)
    x = torch.randn(270, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    result = fasp_fx.prune(model, (x[:90],), calibration=list(x.chunk(3)), sparsity=0.3, quality="fast")
    cut = fasp_fx.apply(model, result.plan, (x[:90],))
    with torch.no_grad():
        repaired, left = ((one.module(x) - model(x)).norm() for one in (result, cut))
    assert repaired < left


def test_a_grouped_convolution_scores_each_group_by_itself() -> None:
    """Of each group the input channel with the least influence goes, whatever the other groups hold."""
    first, second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4)
    with torch.no_grad():
        for weight in (first.weight, second.weight):
            weight.fill_(1.0)
        second.weight[0:2, 1] = 0.01  # group 0: its second input
        second.weight[2:4, 0] = 0.01  # group 1: its first
        second.weight[4:6, 1] = 0.01
        second.weight[6:8, 0] = 0.01
    model = nn.Sequential(first, second, nn.Conv2d(8, 5, 1)).eval()
    result = fasp_fx.prune(model, (torch.randn(2, 3, 4, 4),), sparsity=0.5, score="magnitude", restore=None)
    (part,) = [part for group in result.plan.groups for part in group.consumers if part.name == "1.weight"]
    assert part.block_dim == 0
    assert part.removed == ((1,), (0,), (1,), (0,))
    assert result.module.get_parameter("1.weight").shape[1] == 1
