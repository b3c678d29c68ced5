"""A model that answers in 70 % of the time: its layers are timed here once, at a few widths, and a budget of
latency looks the times up.

    python examples/latency.py [SHARE]
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
import torch
from torch import nn

import fasp_fx
from fasp_fx.allocation import Latency

GRID = (0.25, 0.5, 0.75, 1.0)


def seconds_of(call: Callable[[], object], times: int = 50) -> float:
    call()
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return min(spent)


def feed_forward(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Residual(nn.Module):
    def __init__(self, width: int, hiddens: Iterable[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(feed_forward(width, hidden) for hidden in hiddens)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


share = float(sys.argv[1]) if len(sys.argv) > 1 else 0.7
torch.set_num_threads(1)  # what is measured is one core
torch.manual_seed(0)
model, x = Residual(256, (1024, 512, 512)).eval(), torch.randn(64, 256)
captured = fasp_fx.capture(model, (x,))
groups = [group for group in fasp_fx.analyze(captured).groups if group.status == "prunable"]

with torch.no_grad():
    tables = {}
    for group in groups:
        widths = [round(part * group.width) for part in GRID]
        blocks = [feed_forward(256, width).eval() for width in widths]
        tables[group.name] = widths, [seconds_of(partial(block, x)) for block in blocks]


def seconds(
    widths: Mapping[str, int],
) -> float:  # what is left of each group -> how long all of them take together
    return float(sum(np.interp(width, *tables[name]) for name, width in widths.items()))


data = [torch.randn(64, 256) for _ in range(8)]
result = fasp_fx.prune(captured, calibration=data, budget=Latency(share, seconds), round_to=16)
(spent,) = result.report.budgets
with torch.no_grad():
    before, after = seconds_of(lambda: model(x)), seconds_of(lambda: result.module(x))
print(f"predicted: {spent.dense:,.0f} microseconds, then {spent.used:,.0f}")
print(f"measured:  {before * 1e6:,.0f} microseconds, then {after * 1e6:,.0f}")
