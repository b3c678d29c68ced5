"""Small models made of a forward and of what it reads, each an entry of some table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


def linear(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    """Linear layers by their names."""
    return {name: nn.Linear(*size) for name, size in sizes.items()}


def stack(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).eval()


def parameter(*shape: int, scale: float = 1.0, **options: Any) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, **options) * scale)


def randomise(module: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Draw every parameter anew: matrices from N(0, std²), biases too, norm weights around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(noise + 1 if is_scale else noise)
    return module.eval()


class Between(nn.Module):
    """A function of twelve channels between two linear layers; what follows can be pruned whatever becomes of
    it.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (
            nn.Linear(8, 12),
            nn.Linear(12, 5),
            nn.Linear(5, 16),
            nn.Linear(16, 4),
        )
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.third(self.second(self.function(F.relu(self.first(x)))))))
