"""Blocks over images of one or two dimensions, and the ways out of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ._spec import Block, Shape, choice, positive

POOLS = ("max", "avg", "adaptive")
COLLAPSES = ("flatten", "mean")
RESIZES = ("upsample", "pixel_shuffle")


@dataclass(frozen=True, repr=False)
class Conv(Block):
    """A convolution to ``channels`` channels, padded to keep the sizes (with ``stride`` 2: to halve them).

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

    def __post_init__(self) -> None:
        positive(channels=self.channels, kernel=self.kernel, stride=self.stride, groups=self.groups)

    def groups_for(self, shape: Shape) -> int:
        """The number of groups behind this shape."""
        return shape.channels if self.depthwise else self.groups

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "image")
        groups = self.groups_for(shape)
        if shape.channels % groups or self.channels % groups:
            raise self.refuse(
                shape,
                f"{shape.channels} and {self.channels} channels do not both divide into {groups} groups",
            )
        if self.kernel % 2 == 0:
            raise self.refuse(shape, "an even kernel does not keep the sizes")
        sizes = (size * self.stride if self.transposed else -(-size // self.stride) for size in shape.sizes)
        return Shape("image", self.channels, tuple(sizes))


@dataclass(frozen=True, repr=False)
class Pool(Block):
    """Pooling by two: ``max``, ``avg``, or ``adaptive`` average to one position less."""

    kind: str = "max"

    def __post_init__(self) -> None:
        choice(self.kind, POOLS, "kind")

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "image")
        if min(shape.sizes) < 2:
            raise self.refuse(shape, "there is nothing left to pool")
        return replace(
            shape, sizes=tuple(size - 1 if self.kind == "adaptive" else size // 2 for size in shape.sizes)
        )


@dataclass(frozen=True, repr=False)
class SqueezeExcite(Block):
    """Every channel scaled by a gate computed from the mean of all, through ``width`` neurons."""

    width: int

    def __post_init__(self) -> None:
        positive(width=self.width)

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "image")
        return shape


@dataclass(frozen=True, repr=False)
class Resize(Block):
    """Twice as large: ``upsample`` by repeating, or ``pixel_shuffle`` of channels into positions (two
    dimensions only).
    """

    kind: str = "upsample"

    def __post_init__(self) -> None:
        choice(self.kind, RESIZES, "kind")

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "image")
        sizes = tuple(2 * size for size in shape.sizes)
        if self.kind == "upsample":
            return replace(shape, sizes=sizes)
        if len(sizes) != 2 or shape.channels % 4:
            raise self.refuse(
                shape, "pixel shuffle takes images of two dimensions and a multiple of 4 channels"
            )
        return Shape("image", shape.channels // 4, sizes)


@dataclass(frozen=True, repr=False)
class Collapse(Block):
    """To vectors: ``flatten`` positions and channels together, or their ``mean`` over positions. Takes
    sequences too.
    """

    kind: str = "flatten"

    def __post_init__(self) -> None:
        choice(self.kind, COLLAPSES, "kind")

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "image", "sequence")
        return Shape("vector", shape.channels * (math.prod(shape.sizes) if self.kind == "flatten" else 1))
