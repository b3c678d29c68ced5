"""How blocks are drawn behind a running shape: which ones can follow, simplest first, and with which options.

The first of every choice is the simplest, so that hypothesis shrinks to it. It counts fewer choices as
simpler still, so every option is drawn whether or not it applies. Bodies inside other blocks keep the layout
and its sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from ._spec import after
from .specs import (
    Across,
    Activation,
    Attention,
    Block,
    Branches,
    Collapse,
    Conv,
    Experts,
    Foreign,
    Fused,
    Gated,
    Linear,
    MixTokens,
    Move,
    Norm,
    Odd,
    Pick,
    Pool,
    Regroup,
    Remember,
    Residual,
    Resize,
    Reuse,
    Scale,
    Shape,
    Sized,
    Split,
    SqueezeExcite,
    Tied,
)

#: widths, in the order in which they shrink; with one channel nothing can be removed
WIDTHS = (2, 3, 4, 6, 8, 1)
#: no running shape gets wider than this
WIDEST = 12


@dataclass(frozen=True)
class Limits:
    """What may be drawn: the kinds of blocks, how deep they nest, and whether sizes must stay,
    and the last layer is the embedding.
    """

    kinds: tuple[str, ...]
    depth: int = 1
    keep: bool = False
    longest: int = 3
    tied: bool = False

    def inside(self) -> Limits:
        """The limits inside a block."""
        return Limits(self.kinds, self.depth - 1, True, 2)


def width(draw: st.DrawFn) -> int:
    """A number of channels."""
    return draw(st.sampled_from(WIDTHS))


def divisor(draw: st.DrawFn, number: int) -> int:
    """A divisor, one first."""
    return draw(st.sampled_from([d for d in range(1, number + 1) if number % d == 0]))


def option(draw: st.DrawFn, kind: type[Block], name: str, allowed: Sequence[str] | None = None) -> str:
    """The value of a field of text."""
    return draw(st.sampled_from(kind.choices[name] if allowed is None else allowed))


def dense(draw: st.DrawFn, shape: Shape, channels: int | None = None) -> Block:
    """The layer that mixes channels in this layout: linear, or a convolution."""
    channels = width(draw) if channels is None else channels
    if shape.layout != "image":
        return Linear(channels, bias=draw(st.sampled_from([True, False])))
    return Conv(channels, kernel=draw(st.sampled_from([1, 3])), bias=draw(st.sampled_from([True, False])))


def body(draw: st.DrawFn, shape: Shape, limits: Limits, channels: int | None = None) -> tuple[Block, ...]:
    """A dense layer and what follows; with ``channels``, it ends with that many."""
    blocks = [dense(draw, shape)]
    blocks += more(draw, blocks[0].result(shape), limits)
    if channels is not None and after(tuple(blocks), shape).channels != channels:
        blocks.append(dense(draw, after(tuple(blocks), shape), channels))
    return tuple(blocks)


def more(draw: st.DrawFn, shape: Shape, limits: Limits) -> list[Block]:
    """Blocks one after another, often none."""
    blocks: list[Block] = []
    while draw(st.integers(0, 2 if len(blocks) < limits.longest else 0)):
        # The last one is drawn too: without a block, every other choice stays in place.
        fitting = [kind for kind in limits.kinds if fits(kind, shape, limits)]
        block = DRAWERS[draw(st.sampled_from(fitting))](draw, shape, limits)
        blocks.append(block)
        shape = block.result(shape)
    return blocks


#: the classes of the kinds that do not follow every layout
_CLASSES: dict[str, type[Block]] = {
    kind.__name__: kind
    for kind in (Gated, Tied, MixTokens, Attention, Experts, SqueezeExcite, Conv, Pool, Resize, Collapse)
}


def fits(kind: str, shape: Shape, limits: Limits) -> bool:
    """Whether a kind of block can follow a shape within limits."""
    if kind in _CLASSES and shape.layout not in _CLASSES[kind].layouts:
        return False
    conditions = {
        "Pool": lambda: not limits.keep and min(shape.sizes) > 2,
        "Resize": lambda: not limits.keep and max(shape.sizes) <= 4,
        "Collapse": lambda: not limits.keep,
        "Gated": lambda: shape.channels <= WIDEST,
        "Residual": lambda: limits.depth >= 1,
        "Branches": lambda: limits.depth >= 1 and shape.channels <= WIDEST,
        "Split": lambda: limits.depth >= 1 and shape.channels >= 2,
    }
    return kind not in conditions or conditions[kind]()


def _activation(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    kinds = [kind for kind in Activation.choices["kind"] if kind != "prelu" or shape.layout != "sequence"]
    return Activation(option(draw, Activation, "kind", kinds))


def _norm(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    if shape.layout == "image":
        single = all(size == 1 for size in shape.sizes)
        kind = option(draw, Norm, "kind", ["batch", "group"] if single else ["batch", "group", "instance"])
        groups = divisor(draw, shape.channels)
        return Norm(kind, groups if kind == "group" else 1)
    batch = ["batch"] if shape.layout == "vector" else []
    return Norm(option(draw, Norm, "kind", ["layer", "rms", "plain_rms", *batch]))


def _move(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    kind = option(draw, Move, "kind", ["flip", "shuffle", "roll", "pad"])
    groups = divisor(draw, shape.channels)
    return Move(kind, groups) if kind == "shuffle" else Move(kind)


def attention(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    """Attention with all its options."""
    projection, repeat = option(draw, Attention, "projection"), draw(st.integers(1, 3))
    return Attention(
        kv_heads=draw(st.integers(1, 3)),
        repeat=1 if projection == "stacked" else repeat,
        head_dim=draw(st.sampled_from([2, 4, 6, 8])),
        bias=draw(st.booleans()),
        projection=projection,
        **{name: option(draw, Attention, name) for name in ("positions", "kernel", "sharing")},
    )


def _experts(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    route, form = option(draw, Experts, "route"), option(draw, Experts, "form")
    return Experts(width(draw), draw(st.integers(2, 3)), route, "loop" if route == "top" else form)


def _branches(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    join = option(draw, Branches, "join")
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
    hows = [how for how in Split.choices["how"] if how == "split" or shape.channels % parts == 0]
    how, join = option(draw, Split, "how", hows), option(draw, Split, "join")
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


def _resize(draw: st.DrawFn, shape: Shape, limits: Limits) -> Block:
    shuffles = len(shape.sizes) == 2 and shape.channels % 4 == 0
    return Resize(option(draw, Resize, "kind", ["upsample", "pixel_shuffle"] if shuffles else ["upsample"]))


#: odd blocks; those that follow most layouts come first, so that each stays what it is in a simpler layout
_ODD: tuple[Any, ...] = (Across, Foreign, Remember, Reuse, Pick, Regroup, Sized, Fused)


def _odd(draw: st.DrawFn, shape: Shape, limits: Limits) -> Odd:
    """An odd block; every one makes the same choices, so that none counts as simpler than the first."""
    wide = width(draw)
    chosen = draw(st.sampled_from([kind for kind in _ODD if shape.layout in kind.layouts]))
    kinds = chosen.choices["kind"]
    if chosen is Sized and shape.sizes[0] > shape.channels:
        kinds = [kind for kind in kinds if kind != "select"]
    kind = option(draw, chosen, "kind", kinds)
    divisors = [d for d in range(2, shape.channels + 1) if shape.channels % d == 0] or [1]
    blocks = draw(st.sampled_from(divisors))
    if chosen in (Reuse, Pick, Fused):
        return chosen(wide, kind, *([blocks] if chosen is Fused else []))
    return chosen(kind, blocks) if kind in chosen.in_blocks else chosen(kind)


Drawer = Callable[[st.DrawFn, Shape, Limits], Block]
#: how each kind is drawn, simplest first
DRAWERS: dict[str, Drawer] = {
    "Dense": lambda draw, shape, limits: dense(draw, shape),
    "Activation": _activation,
    "Scale": lambda draw, shape, limits: Scale(draw(st.booleans())),
    "Norm": _norm,
    "Move": _move,
    "Gated": lambda draw, shape, limits: Gated(width(draw), option(draw, Gated, "form"), draw(st.booleans())),
    "Residual": lambda draw, shape, limits: Residual(body(draw, shape, limits.inside())),
    "Branches": _branches,
    "Split": _split,
    "Tied": lambda draw, shape, limits: Tied(width(draw), option(draw, Tied, "form")),
    "Conv": _conv,
    "Pool": lambda draw, shape, limits: Pool(option(draw, Pool, "kind")),
    "SqueezeExcite": lambda draw, shape, limits: SqueezeExcite(width(draw)),
    "Resize": _resize,
    "MixTokens": lambda draw, shape, limits: MixTokens(width(draw)),
    "Attention": attention,
    "Experts": _experts,
    "Collapse": lambda draw, shape, limits: Collapse(option(draw, Collapse, "kind")),
    "Odd": _odd,
}
