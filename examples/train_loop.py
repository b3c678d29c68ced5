"""Train handwritten digits and let the network shrink on the way, in a loop of one's own. Stopped at any time
and started again, it goes on to the same end.

    python train_loop.py checkpoint.pt
"""

import sys
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from fasp_fx.training import Schedule, cubic

STEPS = 300
images, labels = (torch.from_numpy(found) for found in load_digits(return_X_y=True))
images = images.float().reshape(-1, 1, 8, 8) / 8 - 1
torch.manual_seed(0)
model: nn.Module = nn.Sequential(
    *(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10)),
)
schedule = Schedule(cubic(0.6, begin=60, end=180, times=3), images[:512].split(64))
kept = Path(sys.argv[1])
state: dict[str, Any] = torch.load(kept) if kept.exists() else {"step": 0}
if kept.exists():
    schedule.load_state_dict(state["schedule"])
    model = schedule.shrink(model)
    model.load_state_dict(state["model"])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=STEPS)
if kept.exists():
    optimizer.load_state_dict(state["optimizer"])
    rate.load_state_dict(state["rate"])
for step in range(state["step"] + 1, STEPS + 1):
    batch = torch.randint(len(images), (64,), generator=torch.Generator().manual_seed(step))
    loss = cross_entropy(model.train()(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    rate.step()
    model = schedule.step(step, model, optimizer)
    if step % 50 == 0:
        parts: dict[str, Any] = {"schedule": schedule, "model": model, "optimizer": optimizer, "rate": rate}
        new = kept.with_suffix(".new")
        torch.save({"step": step} | {name: part.state_dict() for name, part in parts.items()}, new)
        new.replace(kept)  # whole or not at all
        print(step, f"{loss.item():.6f}", sum(weight.numel() for weight in model.parameters()), flush=True)
