"""Train in several processes and let the network shrink on the way, in all of them alike. Stopped at any time
and started again, it goes on to the same end.

    torchrun --nproc-per-node 2 train_ddp.py checkpoint.pt
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fasp_fx.training import Schedule, cubic

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model: nn.Module = nn.Sequential(nn.Linear(16, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 4))
rows = torch.randn(512, 16)
labels = rows.abs().argmax(1) % 4
schedule = Schedule(cubic(0.5, begin=20, end=60, times=2), rows.split(64), group=dist.group.WORLD)
kept = Path(sys.argv[1])
state: dict[str, Any] = torch.load(kept) if kept.exists() else {"step": 0}
if kept.exists():
    schedule.load_state_dict(state["schedule"])
    model = schedule.shrink(model)
    model.load_state_dict(state["model"])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
if kept.exists():
    optimizer.load_state_dict(state["optimizer"])
wrapped = DistributedDataParallel(model)
for step in range(state["step"] + 1, 101):
    batch = torch.randint(len(rows), (size, 32), generator=torch.Generator().manual_seed(step))[rank]
    loss = nn.functional.cross_entropy(wrapped.train()(rows[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    small = schedule.step(step, model, optimizer)
    if small is not model:  # the wrapper is made anew, the optimiser goes on
        model, wrapped = small, DistributedDataParallel(small)
    if step % 25 == 0 and rank == 0:
        parts: dict[str, Any] = {"schedule": schedule, "model": model, "optimizer": optimizer}
        new = kept.with_suffix(".new")
        torch.save({"step": step} | {name: part.state_dict() for name, part in parts.items()}, new)
        new.replace(kept)  # whole or not at all
        print(step, f"{loss.item():.6f}", sum(weight.numel() for weight in model.parameters()), flush=True)
dist.destroy_process_group()
