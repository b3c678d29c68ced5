"""Blocks over the channels of vectors, sequences and images, the ways out of these, and their modules in
plain torch.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._spec import Assembled, Block, Layout, Shape, after, sequence

JOINS = ("cat", "add", "mul")
ROWS: tuple[Layout, ...] = ("vector", "sequence")


class Widened(Block):
    """A block over rows that leads to ``width`` channels."""

    width: int
    layouts = ROWS

    def behind(self, shape: Shape) -> Shape:
        return shape.wide(self.width)


@dataclass(frozen=True, repr=False)
class Linear(Widened):
    """A linear layer to ``width`` channels."""

    width: int
    bias: bool = True

    def module(self, shape: Shape) -> nn.Module:
        return nn.Linear(shape.channels, self.width, self.bias)


_ACTIVATIONS: dict[str, Any] = {
    "relu": lambda channels: nn.ReLU(),
    "gelu": lambda channels: nn.GELU(),
    "silu": lambda channels: nn.SiLU(),
    "tanh": lambda channels: nn.Tanh(),
    "hardswish": lambda channels: nn.Hardswish(),
    "prelu": nn.PReLU,
    "dropout": lambda channels: nn.Dropout(0.5),
}


@dataclass(frozen=True, repr=False)
class Activation(Block):
    """An elementwise function (``prelu`` has a slope per channel, ``dropout`` is inert in evaluation mode);
    any layout.
    """

    kind: str = "relu"
    choices: ClassVar = {"kind": tuple(_ACTIVATIONS)}

    def behind(self, shape: Shape) -> Shape:
        if self.kind == "prelu" and shape.layout == "sequence":
            raise self.refuse(shape, "torch's prelu takes dimension 1 for the channels")
        return shape

    def module(self, shape: Shape) -> nn.Module:
        return _ACTIVATIONS[self.kind](shape.channels)


_NORMS: dict[str, Any] = {
    "layer": lambda block, shape: nn.LayerNorm(shape.channels),
    "rms": lambda block, shape: nn.RMSNorm(shape.channels),
    # as most model code writes it: pow, mean, rsqrt, mul
    "plain_rms": lambda block, shape: Assembled(
        lambda m, x: m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        weight=nn.Parameter(torch.ones(shape.channels)),
    ),
    "batch": lambda block, shape: shape.kind_of("BatchNorm")(shape.channels),
    "group": lambda block, shape: nn.GroupNorm(block.groups, shape.channels),
    "instance": lambda block, shape: shape.kind_of("InstanceNorm")(shape.channels, affine=True),
}


@dataclass(frozen=True, repr=False)
class Norm(Block):
    """A normalisation: ``layer``, ``rms`` (``plain_rms`` written out by hand) over vectors and sequences;
    ``batch``, ``group``, ``instance`` over images.

    ``batch`` also takes vectors. ``groups`` belongs to ``group``.
    """

    kind: str = "layer"
    groups: int = 1
    choices: ClassVar = {"kind": tuple(_NORMS)}

    def behind(self, shape: Shape) -> Shape:
        over_images = ("vector", "image") if self.kind == "batch" else ("image",)
        takes = ROWS if self.kind in ("layer", "rms", "plain_rms") else over_images
        if shape.layout not in takes:
            raise self.refuse(shape, f"it takes {' or '.join(takes)} input")
        if self.kind == "instance" and all(size == 1 for size in shape.sizes):
            raise self.refuse(shape, "there is one position to normalise over")
        return self.divided(shape, self.groups, "groups") if self.kind == "group" else shape

    def module(self, shape: Shape) -> nn.Module:
        return _NORMS[self.kind](self, shape)


@dataclass(frozen=True, repr=False)
class Scale(Block):
    """A parameter per channel, multiplied in (layer scale) or, with ``shift``, added; any layout."""

    shift: bool = False

    def module(self, shape: Shape) -> nn.Module:
        trailing = [1] * len(shape.sizes) if shape.layout == "image" else []
        factor = nn.Parameter(torch.ones(shape.channels, *trailing))
        return Assembled(lambda m, x: x + m.factor if self.shift else x * m.factor, factor=factor)


def _shuffled(x: Tensor, dim: int, groups: int) -> Tensor:
    dim = dim % x.dim()
    return x.unflatten(dim, (groups, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


_MOVES: dict[str, Any] = {
    "shuffle": _shuffled,
    "flip": lambda x, dim, groups: x.flip(dim),
    "roll": lambda x, dim, groups: x.roll(1, dim),
    "pad": lambda x, dim, groups: F.pad(x, (0,) * (2 * (x.dim() - 2) if dim == 1 else 0) + (0, 1)),
}


@dataclass(frozen=True, repr=False)
class Move(Block):
    """Channels in another order: ``shuffle`` in ``groups``, ``flip``, ``roll`` by one, or ``pad`` by one zero
    channel; any layout.
    """

    kind: str = "shuffle"
    groups: int = 2
    choices: ClassVar = {"kind": tuple(_MOVES)}

    def behind(self, shape: Shape) -> Shape:
        shape = self.divided(shape, self.groups, "groups") if self.kind == "shuffle" else shape
        return shape.wide(shape.channels + 1) if self.kind == "pad" else shape

    def module(self, shape: Shape) -> nn.Module:
        return Assembled(lambda m, x: _MOVES[self.kind](x, shape.channel_dim, self.groups))


_GATES: dict[str, Any] = {
    "separate": lambda m, x: F.silu(m.gate(x)) * m.up(x),
    "chunk": lambda m, x: _silu_gate(*m.both(x).chunk(2, dim=-1)),
    "glu": lambda m, x: F.glu(m.both(x), dim=-1),
}


def _silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@dataclass(frozen=True, repr=False)
class Gated(Widened):
    """``silu(gate(x)) * up(x)`` to ``width`` channels; ``form``: two ``separate`` weights, one cut by
    ``chunk``, or one through torch's ``glu``.
    """

    width: int
    form: str = "separate"
    bias: bool = False
    choices: ClassVar = {"form": tuple(_GATES)}

    def module(self, shape: Shape) -> nn.Module:
        names, width = (
            (("gate", "up"), self.width) if self.form == "separate" else (("both",), 2 * self.width)
        )
        parts = {name: nn.Linear(shape.channels, width, self.bias) for name in names}
        return Assembled(_GATES[self.form], **parts)


_TIED: dict[str, Any] = {
    "repeat": lambda m, x: m.out(torch.relu(m.again(torch.tanh(m.again(x))))),
    "pair": lambda m, x: m.down(torch.relu(m.up(x))) + m.down_again(torch.tanh(m.up_again(x))),
    "transpose": lambda m, x: F.linear(torch.tanh(m.up(x)), m.up.weight.t()),
}


@dataclass(frozen=True, repr=False)
class Tied(Widened):
    """One weight used twice, to ``width`` channels.

    ``repeat``: a square linear layer applied twice, then one to ``width``; ``pair``: two branches through one
    pair of layers with biases of their own; ``transpose``: up with a weight and down with the same weight
    transposed (the channels stay as many as they were).
    """

    width: int
    form: str = "repeat"
    choices: ClassVar = {"form": tuple(_TIED)}

    def behind(self, shape: Shape) -> Shape:
        return shape if self.form == "transpose" else super().behind(shape)

    def module(self, shape: Shape) -> nn.Module:
        channels, width = shape.channels, self.width
        if self.form == "repeat":
            again, out = nn.Linear(channels, channels), nn.Linear(channels, width)
            return Assembled(_TIED[self.form], again=again, out=out)
        parts = {"up": nn.Linear(channels, width)}
        if self.form == "pair":
            parts |= {"down": nn.Linear(width, width), "up_again": nn.Linear(channels, width)}
            parts["down_again"] = nn.Linear(width, width)
            for name in ("up", "down"):
                parts[f"{name}_again"].weight = parts[name].weight
        return Assembled(_TIED[self.form], **parts)


@dataclass(frozen=True, repr=False)
class MixTokens(Block):
    """The other axis: a two-layer perceptron of ``width`` neurons over the tokens, as in MLP-Mixer; fixes the
    number of tokens.
    """

    width: int
    layouts = ("sequence",)

    def module(self, shape: Shape) -> nn.Module:
        tokens = shape.sizes[0]
        return Assembled(
            lambda m, x: m.down(F.gelu(m.up(x.transpose(1, 2)))).transpose(1, 2),
            up=nn.Linear(tokens, self.width),
            down=nn.Linear(self.width, tokens),
        )


def join(parts: Sequence[Tensor], how: str, dim: int) -> Tensor:
    """Put parts together along the channels."""
    if how == "cat":
        return torch.cat(list(parts), dim=dim)
    return reduce(operator.add if how == "add" else operator.mul, parts)


def joined(parts: Sequence[Shape], how: str) -> Shape | str:
    """The shape of several parts put together along the channels, or why they do not fit together."""
    if not parts or any((part.layout, part.sizes) != (parts[0].layout, parts[0].sizes) for part in parts):
        return f"of different shapes cannot be joined: {', '.join(map(str, parts))}"
    channels = [part.channels for part in parts]
    if how != "cat" and len(set(channels)) > 1:
        return f"of {', '.join(map(str, channels))} channels cannot be joined by {how!r}"
    return parts[0].wide(sum(channels)) if how == "cat" else parts[0]


@dataclass(frozen=True, repr=False)
class Residual(Block):
    """``x + body(x)``; where the body changes the number of channels, ``x`` goes through a projection of its
    own. Any layout.
    """

    body: tuple[Block, ...]

    def behind(self, shape: Shape) -> Shape:
        result = after(self.body, shape)
        if (result.layout, result.sizes) != (shape.layout, shape.sizes):
            raise self.refuse(shape, f"the body leads to {result}")
        return result

    def module(self, shape: Shape) -> nn.Module:
        wide = self.result(shape).channels
        return Assembled(
            lambda m, x: (x if m.shortcut is None else m.shortcut(x)) + m.body(x),
            body=sequence(self.body, shape),
            shortcut=_projection(shape, wide),
        )


def _projection(shape: Shape, channels: int) -> nn.Module | None:
    """A linear layer, or for images a convolution of one position; none to as many channels."""
    if channels == shape.channels:
        return None
    if shape.layout == "image":
        return shape.kind_of("Conv")(shape.channels, channels, 1, bias=False)
    return nn.Linear(shape.channels, channels, bias=False)


class _Joined(Block):
    """Several bodies, each over the whole input or over its part of the channels, joined."""

    bodies: tuple[tuple[Block, ...], ...]
    join: str

    def entries(self, shape: Shape) -> list[Shape]:
        """The shape that each body is given."""
        return [shape] * len(self.bodies)

    def behind(self, shape: Shape) -> Shape:
        bodies = zip(self.bodies, self.entries(shape), strict=True)
        result = joined([after(body, entry) for body, entry in bodies], self.join)
        if isinstance(result, str):
            raise self.refuse(shape, f"parts {result}")
        return result

    def module(self, shape: Shape) -> nn.Module:
        def join_parts(m: Any, x: Tensor) -> Tensor:
            parts = zip(m.bodies, self.parts(x, shape), strict=True)
            return join([body(part) for body, part in parts], self.join, shape.channel_dim)

        return Assembled(join_parts, bodies=nn.ModuleList(map(sequence, self.bodies, self.entries(shape))))

    def parts(self, x: Tensor, shape: Shape) -> Sequence[Tensor]:
        """What each body is given."""
        return [x] * len(self.bodies)


@dataclass(frozen=True, repr=False)
class Branches(_Joined):
    """Several bodies over one input, joined by ``cat`` (DenseNet, inception), ``add`` or ``mul``; an empty
    body is the input itself. Any layout.
    """

    bodies: tuple[tuple[Block, ...], ...]
    join: str = "cat"
    choices: ClassVar = {"join": JOINS}


@dataclass(frozen=True, repr=False)
class Split(_Joined):
    """The channels cut into equal parts, each through a body of its own, joined again. Any layout.

    ``how``: torch's ``chunk``; ``split`` by a list of sizes, the first of which may be larger; ``slice`` by
    indexing; ``unbind`` of a view.
    """

    bodies: tuple[tuple[Block, ...], ...]
    how: str = "chunk"
    join: str = "cat"
    choices: ClassVar = {"how": ("chunk", "split", "slice", "unbind"), "join": JOINS}

    def sizes(self, shape: Shape) -> list[int]:
        """The channels of each part.

        Raises:
            ArgumentError: there are too few, or they do not divide.
        """
        count = len(self.bodies)
        if self.how != "split" or shape.channels < count:
            self.divided(shape, count, "parts")
        each, rest = divmod(shape.channels, count)
        return [each + rest, *[each] * (count - 1)]

    def entries(self, shape: Shape) -> list[Shape]:
        return [shape.wide(size) for size in self.sizes(shape)]

    def parts(self, x: Tensor, shape: Shape) -> Sequence[Tensor]:
        dim, sizes = shape.channel_dim % x.dim(), self.sizes(shape)
        ways = {
            "chunk": lambda: x.chunk(len(sizes), dim),
            "split": lambda: x.split(sizes, dim),
            "unbind": lambda: x.unflatten(dim, (len(sizes), sizes[0])).unbind(dim),
            "slice": lambda: [x.narrow(dim, sum(sizes[:index]), size) for index, size in enumerate(sizes)],
        }
        return ways[self.how]()


# --- blocks over images of one or two dimensions, and the ways out of them, and their modules in plain torch


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
