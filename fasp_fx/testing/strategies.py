"""Hypothesis strategies over nets: all kinds mixed, and one strategy for each family.

Every strategy shrinks towards two linear layers; that of a family towards two linear layers around the
simplest block that makes the family.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from hypothesis import strategies as st

from fasp_fx.errors import ArgumentError

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
    Images,
    Linear,
    MixTokens,
    Move,
    Net,
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
    Sequences,
    Shape,
    Sized,
    Source,
    Split,
    SqueezeExcite,
    Tied,
    Tokens,
    Vectors,
)

# --- how blocks are drawn behind a running shape: which ones can follow, and with which options. The first of
# every choice is the simplest, so that hypothesis shrinks to it. It counts fewer choices as simpler still, so
# every option is drawn whether or not it applies. Bodies inside other blocks keep the layout and its sizes.


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

    def inside(self) -> Self:
        """The limits inside a block."""
        return type(self)(self.kinds, self.depth - 1, True, 2)


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


# --- the strategies


ALL = tuple(DRAWERS)
_PLAIN = ("Dense", "Activation", "Scale", "Norm", "Move")
#: of so many nets of all kinds, one has odd blocks
_ONE_IN = 5
#: channels of a layer right before an odd block; none is no such layer
_MANY = (0, 6, 8, 12, 4)
_LAYOUTS = ("vectors", "sequences", "tokens", "images")


def programs(
    *, kinds: Sequence[str] = ALL, max_blocks: int = 3, max_depth: int = 2
) -> st.SearchStrategy[Net]:
    """Nets of every kind, combined.

    Args:
        kinds: the kinds of blocks that may occur: names of :data:`fasp_fx.testing.strategies.ALL`.
        max_blocks: the most blocks between the first and the last layer.
        max_depth: how deep blocks hold other blocks.

    Returns:
        A strategy that shrinks to ``Net(blocks=(Linear(width=2), Linear(width=2)))``.

    Raises:
        ArgumentError: a kind is not known, or a bound is negative.

    Examples:
        >>> from hypothesis import strategies as st
        >>> isinstance(fasp_fx.testing.programs(max_blocks=2), st.SearchStrategy)
        True
    """
    unknown = [kind for kind in kinds if kind not in DRAWERS]
    if unknown:
        raise ArgumentError(f"kinds {unknown} are not known; use some of {list(ALL)}")
    if max_blocks < 0 or max_depth < 0:
        raise ArgumentError(f"max_blocks={max_blocks} and max_depth={max_depth} must not be negative")
    limits = Limits(
        tuple(dict.fromkeys(("Dense", *(kind for kind in kinds if kind != "Odd")))),
        max_depth,
        longest=max_blocks,
    )
    inputs, heads = st.sampled_from([1, 1, 2, 3]), st.sampled_from([0, 0, 2])
    if "Odd" not in kinds or not max_blocks:
        return _nets(limits, None, _LAYOUTS, inputs, heads)
    odd = _nets(replace(limits, kinds=(*limits.kinds, "Odd")), "Odd", _LAYOUTS, inputs, heads)
    return st.one_of(*(_nets(limits, None, _LAYOUTS, inputs, heads) for _ in range(_ONE_IN - 1)), odd)


@st.composite
def _nets(
    draw: st.DrawFn,
    limits: Limits,
    must: str | None,
    layouts: Sequence[str],
    inputs: st.SearchStrategy[int],
    heads: st.SearchStrategy[int],
) -> Net:
    sources, join = _sources(draw, draw(st.sampled_from(layouts)), draw(inputs))
    shape = Net((), sources, join).entry()
    blocks: list[Block] = [dense(draw, shape)]
    kinds = tuple(kind for kind in limits.kinds if kind != "Collapse")
    before = limits if must is None else replace(limits, kinds=kinds)
    blocks += more(draw, blocks[-1].result(shape), before)
    if must is not None:
        blocks += _with(draw, must, after(tuple(blocks), shape), limits)
        blocks += more(draw, after(tuple(blocks), shape), limits)
    last, source = after(tuple(blocks), shape), sources[0]
    alone = len(sources) == 1 and last.layout == "sequence"
    if isinstance(source, Tokens) and alone and (limits.tied or draw(st.booleans())):
        blocks.append(dense(draw, last, source.width))
        return Net(tuple(blocks), sources, tied=True)
    count = draw(heads)
    if count:
        ends = tuple(_ending(draw, last) for _ in range(count))
        return Net(tuple(blocks), sources, join, ends, draw(st.booleans()))
    return Net((*blocks, *_ending(draw, last)), sources, join)


def _with(draw: st.DrawFn, kind: str, shape: Shape, limits: Limits) -> list[Block]:
    """The block that makes the family, behind a dense layer where it cannot follow directly."""
    blocks: list[Block] = []
    if not fits(kind, shape, limits):
        blocks.append(dense(draw, shape, 2))
    if kind == "Odd" and (wide := draw(st.sampled_from(_MANY))):
        # What goes wrong there shows on several blocks of several channels.
        blocks.append(dense(draw, shape, wide))
    return [*blocks, DRAWERS[kind](draw, after(tuple(blocks), shape), limits)]


def _sources(draw: st.DrawFn, layout: str, count: int) -> tuple[tuple[Source, ...], str]:
    join = draw(st.sampled_from(["add", "cat", "mul"])) if count > 1 else "add"
    pair = st.lists(st.sampled_from([4, 3, 5]), min_size=1, max_size=2)
    sizes = tuple(draw(pair)) if layout == "images" else ()
    tokens = draw(st.sampled_from([3, 2, 4])) if layout in ("sequences", "tokens") else 0
    common = draw(st.sampled_from([2, 3, 4]))
    sources: list[Source] = []
    for index in range(count):
        width = common if index == 0 else draw(st.sampled_from([common, 2, 3]))
        plain = join == "cat" or width == common
        make: dict[str, Callable[..., Source]] = {
            "vectors": lambda blocks, width=width: Vectors(width, blocks),
            "sequences": lambda blocks, width=width: Sequences(width, tokens, blocks),
            "images": lambda blocks, width=width: Images(width, sizes, blocks),
            "tokens": lambda blocks, width=width: Tokens(
                draw(st.sampled_from([5, 7])), width, tokens, draw(st.booleans()), blocks
            ),
        }
        first = (Sequences(width, tokens) if layout == "tokens" else make[layout](())).first()
        blocks = (dense(draw, first, common),) if not plain or (count > 1 and draw(st.booleans())) else ()
        sources.append(make[layout](blocks))
    return tuple(sources), join


def _ending(draw: st.DrawFn, shape: Shape) -> tuple[Block, ...]:
    """A last dense layer; images mostly become vectors first."""
    if shape.layout == "image" and draw(st.sampled_from([True, False])):
        collapse = Collapse(draw(st.sampled_from(Collapse.choices["kind"])))
        return (collapse, dense(draw, collapse.result(shape)))
    return (dense(draw, shape),)


def _family(
    must: str | None, kinds: Sequence[str] = (), layouts: Sequence[str] = _LAYOUTS, depth: int = 1
) -> st.SearchStrategy[Net]:
    needed = () if must in (None, "Dense") else (must,)
    limits = Limits(tuple(dict.fromkeys((*_PLAIN, *kinds, *needed))), depth)
    return _nets(limits, must, layouts, st.just(1), st.just(0))


def chains() -> st.SearchStrategy[Net]:
    """One layer after another: dense layers, elementwise functions, norms, channels in another order."""
    return _family(None)


def residual() -> st.SearchStrategy[Net]:
    """With at least one residual block."""
    return _family("Residual", depth=2)


def gated() -> st.SearchStrategy[Net]:
    """With at least one gated layer."""
    return _family("Gated", ("Residual",), ("vectors", "sequences", "tokens"))


def convolutional() -> st.SearchStrategy[Net]:
    """Over images of one or two dimensions: convolutions of all kinds, pooling, squeeze-and-excite,
    flattening.
    """
    return _family(
        "Conv", ("Pool", "SqueezeExcite", "Resize", "Residual", "Branches", "Split", "Collapse"), ("images",)
    )


def attention_nets() -> st.SearchStrategy[Net]:
    """With at least one attention: multi-head, grouped-query or multi-query, with and without rotary
    positions.
    """
    return _family("Attention", ("Residual", "Gated"), ("sequences", "tokens"))


def concatenating() -> st.SearchStrategy[Net]:
    """With at least one place where branches meet, mostly by concatenation."""
    return _family("Branches", ("Residual",), depth=2)


def splitting() -> st.SearchStrategy[Net]:
    """With at least one place where channels are cut into parts that go different ways."""
    return _family("Split", ("Branches",), depth=2)


def mixing() -> st.SearchStrategy[Net]:
    """With channels along two axes, as in MLP-Mixer."""
    return _family("MixTokens", ("Residual",), ("sequences", "tokens"))


def tied() -> st.SearchStrategy[Net]:
    """With one weight used twice, inside a block or as embedding and output head."""
    heads = _nets(Limits((*_PLAIN, "Residual"), 1, tied=True), None, ("tokens",), st.just(1), st.just(0))
    return _family("Tied", ("Residual",), ("vectors", "sequences", "tokens")) | heads


def multi_input() -> st.SearchStrategy[Net]:
    """With two or three inputs."""
    return _nets(Limits((*_PLAIN, "Residual"), 1), None, _LAYOUTS, st.integers(2, 3), st.just(0))


def multi_output() -> st.SearchStrategy[Net]:
    """With two or three outputs, as a tuple or a dict."""
    return _nets(Limits((*_PLAIN, "Residual"), 1), None, _LAYOUTS, st.just(1), st.integers(2, 3))


def experts() -> st.SearchStrategy[Net]:
    """With at least one mixture of experts."""
    return _family("Experts", ("Residual",), ("vectors", "sequences", "tokens"))


def odd_nets() -> st.SearchStrategy[Net]:
    """With at least one odd block: operators across blocks of channels, reshapes that read them in another
    order, buffers that calls write, foreign operators, sizes used as numbers, weights read in two ways,
    positions that indices name, fused projections whose tokens are moved.
    """
    return _family("Odd", ("Residual",), ("vectors", "sequences", "sequences", "tokens", "tokens", "images"))


@st.composite
def decoders(draw: st.DrawFn) -> Net:
    """Decoders as language models build them; shrinks to one layer of a single head of two channels."""
    hidden, layers = draw(st.sampled_from([4, 6, 8])), draw(st.integers(1, 2))
    kind = draw(st.sampled_from(["layer", "rms", "plain_rms"]))
    heads = attention(draw, Shape("sequence", hidden, (4,)), Limits(()))
    inner, bias, parallel = draw(st.integers(1, WIDEST)), draw(st.booleans()), draw(st.booleans())
    form = draw(st.sampled_from(["none", "separate", "chunk"]))
    up: tuple[Block, ...] = (
        (Linear(inner, bias), Activation("gelu")) if form == "none" else (Gated(inner, form, bias),)
    )
    feed = (Norm(kind), *up, Linear(hidden, bias))
    layer: tuple[Block, ...] = (Residual((Norm(kind), heads)), Residual(feed))
    if parallel:
        layer = (Residual((Branches(((Norm(kind), heads), feed), "add"),)),)
    source = Tokens(11, hidden, 4, draw(st.booleans()))
    if draw(st.booleans()):
        return Net((*layer * layers, Norm(kind)), (source,), tied=True)
    return Net((*layer * layers, Norm(kind), Linear(source.vocabulary, bias=False)), (source,))


#: every family by name
FAMILIES: dict[str, Callable[[], st.SearchStrategy[Net]]] = {
    "chains": chains,
    "residual": residual,
    "gated": gated,
    "convolutional": convolutional,
    "attention": attention_nets,
    "concatenating": concatenating,
    "splitting": splitting,
    "mixing": mixing,
    "tied": tied,
    "multi_input": multi_input,
    "multi_output": multi_output,
    "experts": experts,
    "odd": odd_nets,
    "decoders": decoders,
}
