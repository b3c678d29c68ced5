"""Blocks over images of one or two dimensions, and the ways out of them, and their modules in plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from ._spec import Assembled, Block, Layout, Shape

_IMAGE: tuple[Layout, ...] = ("image",)


@dataclass(frozen=True, repr=False)
class Conv(Block):
    """A convolution to ``channels`` channels with an odd kernel, padded to keep the sizes (with ``stride`` 2:
    to halve them).

    ``depthwise``: as many groups as input channels, of which ``channels`` is a multiple. ``transposed`` with
    ``stride`` 2 doubles the sizes.
    """

    channels: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    depthwise: bool = False
    transposed: bool = False
    bias: bool = True
    layouts = _IMAGE

    def behind(self, shape: Shape) -> Shape:
        groups = shape.channels if self.depthwise else self.groups
        if shape.channels % groups or self.channels % groups:
            both = f"{shape.channels} and {self.channels} channels"
            raise self.refuse(shape, f"{both} do not both divide into {groups} groups")
        sizes = (size * self.stride if self.transposed else -(-size // self.stride) for size in shape.sizes)
        return Shape("image", self.channels, tuple(sizes))

    def module(self, shape: Shape) -> nn.Module:
        geometry = (shape.channels, self.channels, self.kernel, self.stride, self.kernel // 2)
        groups = shape.channels if self.depthwise else self.groups
        if self.transposed:
            return shape.kind_of("ConvTranspose")(*geometry, self.stride - 1, groups, self.bias)
        return shape.kind_of("Conv")(*geometry, groups=groups, bias=self.bias)


@dataclass(frozen=True, repr=False)
class Pool(Block):
    """Pooling by two: ``max``, ``avg``, or ``adaptive`` average to one position less."""

    kind: str = "max"
    layouts = _IMAGE
    choices: ClassVar = {"kind": ("max", "avg", "adaptive")}

    def behind(self, shape: Shape) -> Shape:
        if min(shape.sizes) < 2:
            raise self.refuse(shape, "there is nothing left to pool")
        sizes = tuple(size - 1 if self.kind == "adaptive" else size // 2 for size in shape.sizes)
        return replace(shape, sizes=sizes)

    def module(self, shape: Shape) -> nn.Module:
        if self.kind == "adaptive":
            return shape.kind_of("AdaptiveAvgPool")(tuple(size - 1 for size in shape.sizes))
        return shape.kind_of("MaxPool" if self.kind == "max" else "AvgPool")(2)


@dataclass(frozen=True, repr=False)
class SqueezeExcite(Block):
    """Every channel scaled by a gate computed from the mean of all, through ``width`` neurons."""

    width: int
    layouts = _IMAGE

    def module(self, shape: Shape) -> nn.Module:
        kind = shape.kind_of("Conv")
        dims = tuple(range(2, 2 + len(shape.sizes)))
        return Assembled(
            lambda m, x: x * torch.sigmoid(m.expand(torch.relu(m.reduce(x.mean(dims, keepdim=True))))),
            reduce=kind(shape.channels, self.width, 1),
            expand=kind(self.width, shape.channels, 1),
        )


@dataclass(frozen=True, repr=False)
class Resize(Block):
    """Twice as large: ``upsample`` by repeating, or ``pixel_shuffle`` of channels into positions (two
    dimensions only).
    """

    kind: str = "upsample"
    layouts = _IMAGE
    choices: ClassVar = {"kind": ("upsample", "pixel_shuffle")}

    def behind(self, shape: Shape) -> Shape:
        sizes, shuffles = tuple(2 * size for size in shape.sizes), self.kind == "pixel_shuffle"
        if shuffles and (len(sizes) != 2 or shape.channels % 4):
            why = "pixel shuffle takes images of two dimensions and a multiple of 4 channels"
            raise self.refuse(shape, why)
        return Shape("image", shape.channels // 4 if shuffles else shape.channels, sizes)

    def module(self, shape: Shape) -> nn.Module:
        return nn.PixelShuffle(2) if self.kind == "pixel_shuffle" else nn.Upsample(scale_factor=2.0)


@dataclass(frozen=True, repr=False)
class Collapse(Block):
    """To vectors: ``flatten`` positions and channels together, or their ``mean`` over positions. Takes
    sequences too.
    """

    kind: str = "flatten"
    layouts = ("image", "sequence")
    choices: ClassVar = {"kind": ("flatten", "mean")}

    def behind(self, shape: Shape) -> Shape:
        return Shape("vector", shape.channels * (math.prod(shape.sizes) if self.kind == "flatten" else 1))

    def module(self, shape: Shape) -> nn.Module:
        dims = (1,) if shape.layout == "sequence" else tuple(range(2, 2 + len(shape.sizes)))
        return Assembled(lambda m, x: x.flatten(1) if self.kind == "flatten" else x.mean(dims))
