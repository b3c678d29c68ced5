"""How blocks are drawn behind a running shape: which ones can follow, simplest first, and with which options.

The first of every choice is the simplest, so that hypothesis shrinks to it. It counts fewer choices as
simpler still, so every option is drawn whether or not it applies. Bodies inside other blocks keep the layout
and its sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st

from ._channel_blocks import (
    ACTIVATIONS,
    GATES,
    JOINS,
    PARTS,
    TIES,
    Activation,
    Branches,
    Gated,
    Linear,
    MixTokens,
    Move,
    Norm,
    Residual,
    Scale,
    Split,
    Tied,
)
from ._draw_odd import draw_odd
from ._image_blocks import COLLAPSES, POOLS, Collapse, Conv, Pool, Resize, SqueezeExcite
from ._large_blocks import EXPERTS, KERNELS, POSITIONS, PROJECTIONS, ROUTES, SHARING, Attention, Experts
from ._spec import Block, Shape, after

#: widths, in the order in which they shrink; with one channel nothing can be removed
WIDTHS = (2, 3, 4, 6, 8, 1)
#: no running shape gets wider than this
WIDEST = 12


@dataclass(frozen=True)
class Limits:
    """What may be drawn: the kinds of blocks, how deep they nest, and whether sizes must stay."""

    kinds: tuple[str, ...]
    depth: int = 1
    keep: bool = False
    longest: int = 3

    def inside(self) -> Limits:
        """The limits inside a block."""
        return Limits(self.kinds, self.depth - 1, True, 2)


Drawer = Callable[[st.DrawFn, Shape, Limits], Block]


def width(draw: st.DrawFn) -> int:
    """A number of channels."""
    return draw(st.sampled_from(WIDTHS))


def divisor(draw: st.DrawFn, number: int) -> int:
    """A divisor, one first."""
    return draw(st.sampled_from([d for d in range(1, number + 1) if number % d == 0]))


def dense(draw: st.DrawFn, shape: Shape, channels: int | None = None) -> Block:
    """The layer that mixes channels in this layout: linear, or a convolution."""
    channels = width(draw) if channels is None else channels
    if shape.layout != "image":
        return Linear(channels, bias=draw(st.sampled_from([True, False])))
    return Conv(channels, kernel=draw(st.sampled_from([1, 3])), bias=draw(st.sampled_from([True, False])))


def body(draw: st.DrawFn, shape: Shape, limits: Limits, channels: int | None = None) -> tuple[Block, ...]:
    """A dense layer and what follows; with ``channels``, it ends with that many."""
    found = [dense(draw, shape)]
    found += more(draw, found[0].result(shape), limits)
    if channels is not None and after(tuple(found), shape).channels != channels:
        found.append(dense(draw, after(tuple(found), shape), channels))
    return tuple(found)


def more(draw: st.DrawFn, shape: Shape, limits: Limits) -> list[Block]:
    """Blocks one after another, often none."""
    found: list[Block] = []
    while draw(st.integers(0, 2 if len(found) < limits.longest else 0)):
        # The last one is drawn too: without a block, every other choice stays in place.
        block = any_block(draw, shape, limits)
        found.append(block)
        shape = block.result(shape)
    return found


def any_block(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    """One block that can follow."""
    fitting = [kind for kind in limits.kinds if fits(kind, shape, limits)]
    return DRAWERS[draw(st.sampled_from(fitting))](draw, shape, limits)


def fits(kind: str, shape: Shape, limits: Limits) -> bool:
    """Whether a kind of block can follow a shape within limits."""
    layouts, nested, resizes = _TRAITS.get(kind, (("vector", "sequence", "image"), False, False))
    if shape.layout not in layouts or (nested and limits.depth < 1) or (resizes and limits.keep):
        return False
    if kind == "Pool":
        return min(shape.sizes) > 2
    if kind == "Resize":
        return max(shape.sizes) <= 4
    if kind in ("Branches", "Gated"):
        return shape.channels <= WIDEST
    return kind != "Split" or shape.channels >= 2


#: layouts a kind can follow, whether it holds other blocks, whether it changes layout or sizes
_TRAITS: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    "Gated": (("vector", "sequence"), False, False),
    "Tied": (("vector", "sequence"), False, False),
    "MixTokens": (("sequence",), False, False),
    "Attention": (("sequence",), False, False),
    "Experts": (("vector", "sequence"), False, False),
    "SqueezeExcite": (("image",), False, False),
    "Conv": (("image",), False, False),
    "Pool": (("image",), False, True),
    "Resize": (("image",), False, True),
    "Collapse": (("image", "sequence"), False, True),
    "Residual": (("vector", "sequence", "image"), True, False),
    "Branches": (("vector", "sequence", "image"), True, False),
    "Split": (("vector", "sequence", "image"), True, False),
}


def _dense(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    return dense(draw, shape)


def _activation(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    return Activation(
        draw(st.sampled_from([kind for kind in ACTIVATIONS if kind != "prelu" or shape.layout != "sequence"]))
    )


def _norm(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    if shape.layout == "image":
        single = all(size == 1 for size in shape.sizes)
        kind = draw(st.sampled_from(["batch", "group"] if single else ["batch", "group", "instance"]))
        groups = divisor(draw, shape.channels)
        return Norm(kind, groups if kind == "group" else 1)
    return Norm(
        draw(st.sampled_from(["layer", "rms", "plain_rms", *(["batch"] if shape.layout == "vector" else [])]))
    )


def _scale(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    return Scale(draw(st.booleans()))


def _move(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    kind, groups = draw(st.sampled_from(["flip", "shuffle", "roll", "pad"])), divisor(draw, shape.channels)
    return Move(kind, groups) if kind == "shuffle" else Move(kind)


def _gated(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    return Gated(width(draw), draw(st.sampled_from(GATES)), draw(st.booleans()))


def _tied(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    return Tied(width(draw), draw(st.sampled_from(TIES)))


def _mix_tokens(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    return MixTokens(width(draw))


def attention(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    """Attention with all its options."""
    projection, repeat = draw(st.sampled_from(PROJECTIONS)), draw(st.integers(1, 3))
    return Attention(
        kv_heads=draw(st.integers(1, 3)),
        repeat=1 if projection == "stacked" else repeat,
        head_dim=draw(st.sampled_from([2, 4, 6, 8])),
        bias=draw(st.booleans()),
        projection=projection,
        positions=draw(st.sampled_from(POSITIONS)),
        kernel=draw(st.sampled_from(KERNELS)),
        sharing=draw(st.sampled_from(SHARING)),
    )


def _experts(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    route, form = draw(st.sampled_from(ROUTES)), draw(st.sampled_from(EXPERTS))
    return Experts(width(draw), draw(st.integers(2, 3)), route, "loop" if route == "top" else form)


def _residual(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    return Residual(body(draw, shape, limits.inside()))


def _branches(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    join = draw(st.sampled_from(JOINS))
    channels = None if join == "cat" else width(draw)
    itself = draw(st.sampled_from([True, False])) and channels in (None, shape.channels)
    bodies = [
        () if itself else body(draw, shape, limits.inside(), channels),
        body(draw, shape, limits.inside(), channels),
    ]
    while draw(st.integers(0, 1 if len(bodies) < 3 else 0)):
        bodies.append(body(draw, shape, limits.inside(), channels))
    return Branches(tuple(bodies), join)


def _split(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    parts = draw(st.sampled_from([n for n in (2, 3) if n <= shape.channels]))
    how = draw(st.sampled_from([how for how in PARTS if how == "split" or shape.channels % parts == 0]))
    join = draw(st.sampled_from(JOINS))
    sizes = Split(((),) * parts, how).sizes(shape)
    even = len(set(sizes)) == 1
    channels = None if join == "cat" else sizes[0] if even and draw(st.booleans()) else width(draw)
    bodies = []
    for size in sizes:
        plain = draw(st.sampled_from([True, False])) and channels in (None, size)
        bodies.append(() if plain else body(draw, shape.wide(size), limits.inside(), channels))
    return Split(tuple(bodies), how, join)


def _conv(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    stride = 1 if limits.keep else draw(st.sampled_from([1, 2]))
    kernel = draw(st.sampled_from([1, 3]))
    transposed = draw(st.booleans()) and (stride == 1 or max(shape.sizes) <= 4)
    depthwise, bias = draw(st.booleans()), draw(st.sampled_from([True, False]))
    groups = divisor(draw, shape.channels)
    each = draw(st.sampled_from([n for n in (2, 1, 3) if n * groups <= WIDEST] or [1]))
    if depthwise:
        times = 2 if each == 2 and shape.channels <= WIDEST // 2 else 1
        return Conv(shape.channels * times, kernel, stride, depthwise=True, transposed=transposed, bias=bias)
    return Conv(groups * each, kernel, stride, groups, transposed=transposed, bias=bias)


def _pool(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    return Pool(draw(st.sampled_from(POOLS)))


def _resize(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    shuffles = len(shape.sizes) == 2 and shape.channels % 4 == 0
    return Resize(draw(st.sampled_from(["upsample", "pixel_shuffle"] if shuffles else ["upsample"])))


def _squeeze_excite(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    return SqueezeExcite(width(draw))


def _collapse(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    return Collapse(draw(st.sampled_from(COLLAPSES)))


def _odd(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    return draw_odd(draw, shape, width(draw))


#: how each kind is drawn, simplest first
DRAWERS: dict[str, Drawer] = {
    "Dense": _dense,
    "Activation": _activation,
    "Scale": _scale,
    "Norm": _norm,
    "Move": _move,
    "Gated": _gated,
    "Residual": _residual,
    "Branches": _branches,
    "Split": _split,
    "Tied": _tied,
    "Conv": _conv,
    "Pool": _pool,
    "SqueezeExcite": _squeeze_excite,
    "Resize": _resize,
    "MixTokens": _mix_tokens,
    "Attention": attention,
    "Experts": _experts,
    "Collapse": _collapse,
    "Odd": _odd,
}
