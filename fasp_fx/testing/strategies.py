"""Hypothesis strategies over nets: all kinds mixed, and one strategy for each family.

Every strategy shrinks towards two linear layers; that of a family towards two linear layers around the
simplest block that makes the family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from hypothesis import strategies as st

from fasp_fx.errors import ArgumentError

from ._drawing import DRAWERS, WIDEST, Limits, attention, dense, fits, more
from ._spec import after
from .specs import (
    Activation,
    Block,
    Branches,
    Collapse,
    Gated,
    Images,
    Linear,
    Net,
    Norm,
    Residual,
    Sequences,
    Shape,
    Source,
    Tokens,
    Vectors,
)

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
    layout = draw(st.sampled_from(layouts))
    sources, join = _sources(draw, layout, draw(inputs))
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
    limits = Limits((*_PLAIN, "Residual"), 1, tied=True)
    heads = _nets(limits, None, ("tokens",), st.just(1), st.just(0))
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
