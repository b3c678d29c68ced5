"""The modules of blocks over channels, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._channel_blocks import Activation, Gated, Norm
from ._spec import Shape


def join(parts: Sequence[Tensor], how: str, dim: int) -> Tensor:
    """Put parts together along the channels."""
    if how == "cat":
        return torch.cat(list(parts), dim=dim)
    joined = parts[0]
    for part in parts[1:]:
        joined = joined + part if how == "add" else joined * part
    return joined


def activation(block: Activation, shape: Shape) -> nn.Module:
    """The module of an elementwise function."""
    if block.kind == "prelu":
        return nn.PReLU(shape.channels)
    if block.kind == "dropout":
        return nn.Dropout(0.5)
    simple: dict[str, type[nn.Module]] = {
        "relu": nn.ReLU,
        "gelu": nn.GELU,
        "silu": nn.SiLU,
        "tanh": nn.Tanh,
        "hardswish": nn.Hardswish,
    }
    return simple[block.kind]()


class PlainRMSNorm(nn.Module):
    """RMS norm as most model code writes it: pow, mean, rsqrt, mul."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def norm(block: Norm, shape: Shape) -> nn.Module:
    """The module of a normalisation."""
    channels, spatial = shape.channels, len(shape.sizes)
    if block.kind == "batch":
        return (nn.BatchNorm2d if spatial == 2 else nn.BatchNorm1d)(channels)
    if block.kind == "instance":
        return (nn.InstanceNorm2d if spatial == 2 else nn.InstanceNorm1d)(channels, affine=True)
    if block.kind == "group":
        return nn.GroupNorm(block.groups, channels)
    simple: dict[str, Any] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "plain_rms": PlainRMSNorm}
    return simple[block.kind](channels)


class ScaleChannels(nn.Module):
    """A parameter per channel, multiplied in or added."""

    def __init__(self, shape: Shape, shift: bool) -> None:
        super().__init__()
        trailing = [1] * len(shape.sizes) if shape.layout == "image" else []
        self.factor = nn.Parameter(torch.ones(shape.channels, *trailing))
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor if self.shift else x * self.factor


class MoveChannels(nn.Module):
    """Channels in another order, or one zero channel more."""

    def __init__(self, kind: str, groups: int, dim: int) -> None:
        super().__init__()
        self.kind, self.groups, self.dim = kind, groups, dim

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "flip":
            return x.flip(self.dim)
        if self.kind == "roll":
            return x.roll(1, self.dim)
        if self.kind == "pad":
            return F.pad(x, (0,) * (2 * (x.dim() - 2) if self.dim == 1 else 0) + (0, 1))
        dim = self.dim % x.dim()
        each = x.shape[dim] // self.groups
        return x.unflatten(dim, (self.groups, each)).transpose(dim, dim + 1).flatten(dim, dim + 1)


class GatedLayer(nn.Module):
    """A gate times a value, from two weights or from one cut in halves."""

    def __init__(self, block: Gated, channels: int) -> None:
        super().__init__()
        self.form = block.form
        if block.form == "separate":
            self.gate, self.up = (
                nn.Linear(channels, block.width, block.bias),
                nn.Linear(channels, block.width, block.bias),
            )
        else:
            self.both = nn.Linear(channels, 2 * block.width, block.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "glu":
            return F.glu(self.both(x), dim=-1)
        gate, up = (self.gate(x), self.up(x)) if self.form == "separate" else self.both(x).chunk(2, dim=-1)
        return F.silu(gate) * up


class TiedLayers(nn.Module):
    """One weight used twice."""

    def __init__(self, form: str, channels: int, width: int) -> None:
        super().__init__()
        self.form = form
        if form == "repeat":
            self.again, self.out = nn.Linear(channels, channels), nn.Linear(channels, width)
        else:
            self.up = nn.Linear(channels, width)
        if form == "pair":
            self.down, self.up_again, self.down_again = (
                nn.Linear(width, width),
                nn.Linear(channels, width),
                nn.Linear(width, width),
            )
            self.up_again.weight, self.down_again.weight = self.up.weight, self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "repeat":
            return self.out(torch.relu(self.again(torch.tanh(self.again(x)))))
        if self.form == "transpose":
            return F.linear(torch.tanh(self.up(x)), self.up.weight.t())
        return self.down(torch.relu(self.up(x))) + self.down_again(torch.tanh(self.up_again(x)))


class TokenMixer(nn.Module):
    """A perceptron over the tokens."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(tokens, width), nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class ResidualModule(nn.Module):
    """``x + body(x)``, or ``shortcut(x) + body(x)``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return (x if self.shortcut is None else self.shortcut(x)) + self.body(x)


class BranchesModule(nn.Module):
    """Several bodies over one input."""

    def __init__(self, bodies: Sequence[nn.Module], how: str, dim: int) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)
        self.how, self.dim = how, dim

    def forward(self, x: Tensor) -> Tensor:
        return join([body(x) for body in self.bodies], self.how, self.dim)


class SplitModule(nn.Module):
    """The channels in parts, a body for each."""

    def __init__(self, bodies: Sequence[nn.Module], sizes: list[int], cut: str, how: str, dim: int) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)
        self.sizes, self.cut, self.how, self.dim = sizes, cut, how, dim

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        """The parts of the input."""
        dim = self.dim % x.dim()
        if self.cut == "chunk":
            return x.chunk(len(self.sizes), dim)
        if self.cut == "split":
            return x.split(self.sizes, dim)
        if self.cut == "unbind":
            return x.unflatten(dim, (len(self.sizes), self.sizes[0])).unbind(dim)
        starts = [sum(self.sizes[:index]) for index in range(len(self.sizes))]
        return [x.narrow(dim, start, size) for start, size in zip(starts, self.sizes, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        return join(
            [body(part) for body, part in zip(self.bodies, self.parts(x), strict=True)], self.how, self.dim
        )
