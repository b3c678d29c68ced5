"""A small model with everything that a save must keep, and how to change what was saved."""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fasp_fx


class Mode(enum.Enum):
    PLAIN = 1
    OTHER = 2


class Small(nn.Module):
    """Tied, frozen, transposed and non-persistent tensors, a constant, defaults of several kinds and a
    structured output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.turned = nn.Parameter(torch.randn(8, 8).t())
        self.down.bias.requires_grad_(False)
        self.register_buffer("shift", torch.randn(8))
        self.register_buffer("scratch", torch.randn(8), persistent=False)

    def forward(
        self,
        ids: Tensor,
        scale: float = 2.0,
        *,
        flag: bool = True,
        limit: float = 9.0,
        sizes: tuple[int, ...] = (1, 2),
        mode: Mode = Mode.PLAIN,
    ) -> dict[str, Any]:
        hidden = self.embed(ids) @ self.turned + self.shift * scale + self.scratch + torch.tensor(0.5)
        hidden = (hidden + self.down(torch.relu(self.up(hidden)))).clamp(max=limit)
        return {"logits": self.head(hidden), "extra": [hidden, 3]}


def small_result(model: nn.Module | None = None, **kwargs: Any) -> fasp_fx.Result:
    model = Small().eval() if model is None else model
    ids = torch.randint(0, 11, (2, 5))
    return fasp_fx.prune(model, (ids,), kwargs, calibration=[(torch.randint(0, 11, (2, 5)),)], sparsity=0.3)


def forge(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file and make the manifest agree, as someone who wants to deceive would."""
    file = folder / name
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    seal(folder, name)


def seal(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / name).read_bytes()
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
