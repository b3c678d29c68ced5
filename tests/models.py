"""Small models made of a forward and of what it reads, each an entry of some table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def made(forward: Callable[..., Any], **held: Any) -> nn.Module:
    """A module in evaluation mode with this forward, which gets the module first.

    Args:
        held: modules and parameters; other tensors are buffers.
    """
    # Of a name by which nobody finds the class, so that it is equal to itself alone.
    model: nn.Module = type("<made>", (nn.Module,), {"forward": forward})()
    for name, value in held.items():
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            model.register_buffer(name, value)
        else:
            setattr(model, name, value)
    return model.eval()


def wide(forward: Callable[..., Any], size: int = 6, hidden: int = 24, **held: Any) -> nn.Module:
    """The same with a layer ``up`` to hidden channels and a layer ``down`` back."""
    return made(forward, **{"up": nn.Linear(size, hidden), "down": nn.Linear(hidden, size), **held})


def block(model: Any, x: Tensor) -> Tensor:
    """What such a model computes at the least."""
    found: Tensor = model.down(torch.relu(model.up(x)))
    return found


def stack(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).eval()


def parameter(*shape: int, scale: float = 1.0, **options: Any) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, **options) * scale)
