"""The strategies reach everything they promise, and shrink to two linear layers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from conftest import PROFILE
from hypothesis import HealthCheck, Phase, find, given, settings, strategies as st

from fasp_fx import testing
from fasp_fx.errors import ArgumentError, FaspError
from fasp_fx.testing import build, example, specs, strategies
from fasp_fx.testing._net import blocks_of
from fasp_fx.testing.specs import (
    Across,
    Activation,
    Attention,
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
    Pick,
    Pool,
    Regroup,
    Remember,
    Residual,
    Resize,
    Reuse,
    Scale,
    Sequences,
    Sized,
    Split,
    SqueezeExcite,
    Tied,
    Tokens,
)

PUBLIC = {name: getattr(specs, name) for name in specs.__all__}
#: without the phase that explains: it varies what has been shrunk, and ``find`` returns what it tried last
SEARCH = settings(
    max_examples=4000,
    database=None,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
REACH = settings(SEARCH, phases=[Phase.generate])
TWO_LAYERS = Net((Linear(2), Linear(2)))
#: of programs of all kinds so many are drawn, once for all tests
PROGRAMS = 1200 if PROFILE == "slow" else 600


def minimal(strategy: st.SearchStrategy[Net], condition: Callable[[Net], bool] = lambda net: True) -> Net:
    """The smallest net of a strategy that meets a condition."""
    return find(strategy, condition, settings=SEARCH)


def has(kind: type, /, **options: Any) -> Callable[[Net], bool]:
    """Whether a net has a block of a kind with these options."""
    return lambda net: any(
        isinstance(block, kind) and all(getattr(block, k) == v for k, v in options.items())
        for block in blocks_of(net)
    )


@pytest.mark.parametrize("name", [*strategies.FAMILIES, "programs"])
@settings(max_examples=12)
@given(data=st.data())
def test_drawn_nets_print_build_and_run(name: str, data: st.DataObject) -> None:
    net = data.draw(strategies.FAMILIES[name]() if name in strategies.FAMILIES else strategies.programs())
    assert eval(repr(net), dict(PUBLIC)) == net
    build(net)(*example(net))


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (strategies.residual, Net((Linear(2), Residual((Linear(2),)), Linear(2)))),
        (strategies.gated, Net((Linear(2), Gated(2), Linear(2)))),
        (strategies.convolutional, Net((Conv(2), Conv(2), Collapse(), Linear(2)), (Images(),))),
        (strategies.attention_nets, Net((Linear(2), Attention(), Linear(2)), (Sequences(),))),
        (strategies.concatenating, Net((Linear(2), Branches(((), (Linear(2),))), Linear(2)))),
        (strategies.splitting, Net((Linear(2), Split(((), ())), Linear(2)))),
        (strategies.mixing, Net((Linear(2), MixTokens(2), Linear(2)), (Sequences(),))),
        (strategies.tied, Net((Linear(2), Tied(2), Linear(2)))),
        (strategies.multi_input, Net((Linear(2), Linear(2)), (specs.Vectors(), specs.Vectors()))),
        (strategies.multi_output, Net((Linear(2),), heads=((Linear(2),), (Linear(2),)))),
        (strategies.experts, Net((Linear(2), Experts(2), Linear(2)))),
        (strategies.odd_nets, Net((Linear(2), Across(), Linear(2)))),
        (strategies.chains, TWO_LAYERS),
        (strategies.programs, TWO_LAYERS),
    ],
)
def test_families_shrink_to_two_linear_layers_around_their_block(strategy: Any, expected: Net) -> None:
    assert minimal(strategy()) == expected


WHAT_MATTERS = [
    (has(Residual), Net((Linear(2), Residual((Linear(2),)), Linear(2)))),
    (has(Activation, kind="gelu"), Net((Linear(2), Activation("gelu"), Linear(2)))),
    (has(Linear, width=6), Net((Linear(2), Linear(6)))),
    (lambda net: len(net.blocks) > 3, Net((Linear(2), Linear(2), Linear(2), Linear(2)))),
    (lambda net: net.tied, Net((Linear(2), Linear(2)), (Tokens(),), tied=True)),
    (lambda net: bool(net.heads), Net((Linear(2),), heads=((Linear(2),), (Linear(2),)))),
]
WHAT_IS_ODD = [
    (has(Across, kind="sort"), Net((Linear(2), Across("sort"), Linear(2)))),
    (has(Remember), Net((Linear(2), Remember(), Linear(2)))),
    (has(Foreign), Net((Linear(2), Foreign("number"), Linear(2)))),
    (has(Reuse), Net((Linear(2), Reuse(2), Linear(2)))),
    (has(Pick), Net((Linear(2), Pick(2), Linear(2)))),
    (has(Regroup), Net((Linear(2), Regroup(), Linear(2)), (Sequences(),))),
    (has(Sized, kind="pad"), Net((Linear(2), Sized("pad"), Linear(2)), (Sequences(),))),
    (has(Fused), Net((Linear(2), Fused(2), Linear(2)), (Sequences(),))),
    (has(Fused, kind="windows"), Net((Linear(2), Fused(2, "windows"), Linear(2)), (Sequences(),))),
]


@pytest.mark.parametrize(
    ("strategy", "condition", "expected"),
    [
        *[(strategies.programs, *case) for case in WHAT_MATTERS],
        *[(strategies.odd_nets, *case) for case in WHAT_IS_ODD],
    ],
)
def test_nets_shrink_to_what_matters(strategy: Any, condition: Callable[[Net], bool], expected: Net) -> None:
    assert minimal(strategy(), condition) == expected


@cache
def drawn(name: str, count: int) -> list[Net]:
    """Nets as a strategy draws them."""
    found: list[Net] = []

    @settings(REACH, max_examples=count)
    @given(strategies.FAMILIES[name]() if name in strategies.FAMILIES else strategies.programs())
    def collect(net: Net) -> None:
        found.append(net)

    collect()
    return found


def reached(name: str, count: int, condition: Callable[[Net], bool]) -> bool:
    """Whether a strategy draws a net that meets a condition."""
    return any(condition(net) for net in drawn(name, count))


Options = list[tuple[type, str, tuple[Any, ...]]]


def choices(*kinds: type[specs.Block]) -> Options:
    """What the fields of text of blocks may be."""
    return [(kind, name, values) for kind in kinds for name, values in kind.choices.items()]


OPTIONS: Options = [
    (Linear, "bias", (True, False)),
    (Scale, "shift", (True, False)),
    *choices(Activation, Norm, Move, Gated, Branches, Split, Tied, Collapse, Experts),
]
CONVOLUTIONS: Options = [
    *[(Conv, name, (True, False)) for name in ("depthwise", "transposed")],
    (Conv, "stride", (1, 2)),
    (Conv, "kernel", (1, 3)),
    (Conv, "groups", (1, 2, 3)),
    (SqueezeExcite, "width", (2, 3)),
    *choices(Pool, Resize),
]
ATTENTION: Options = [
    (Attention, "bias", (True, False)),
    *[(Attention, name, (1, 2, 3)) for name in ("kv_heads", "repeat")],
    (Attention, "head_dim", (2, 4, 6, 8)),
    *choices(Attention),
]
ODD: Options = [
    (Across, "blocks", (2, 3, 4)),
    (Fused, "heads", (1, 2, 3)),
    *choices(Across, Regroup, Remember, Foreign, Sized, Reuse, Pick, Fused),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "options"),
    [
        ("odd", 1200, ODD),
        ("programs", PROGRAMS, OPTIONS),
        ("convolutional", 400, CONVOLUTIONS),
        ("decoders", 250, ATTENTION),
    ],
)
def test_every_option_is_reached(name: str, count: int, options: Options) -> None:
    wanted = [(kind, option, value) for kind, option, values in options for value in values]
    missing = [
        (kind.__name__, option, value)
        for kind, option, value in wanted
        if not reached(name, count, has(kind, **{option: value}))
    ]
    assert not missing


@pytest.mark.parametrize(
    "condition",
    [
        lambda net: net.tied,
        lambda net: not net.tied,
        lambda net: len(net.blocks) > 4,
        has(Branches, join="add"),
        has(Gated, form="chunk"),
        has(Gated, form="separate"),
        has(Attention, projection="interleaved", repeat=3),
        lambda net: any(isinstance(source, Tokens) and source.positions for source in net.inputs),
        *[has(Norm, kind=kind) for kind in ("layer", "rms", "plain_rms")],
        *[lambda net, width=width: net.inputs[0].first().channels == width for width in (4, 6, 8)],  # type: ignore[misc]
    ],
)
def test_decoders_reach_the_rest(condition: Callable[[Net], bool]) -> None:
    assert reached("decoders", 250, condition)


@pytest.mark.parametrize(
    "condition",
    [
        lambda net: len(net.inputs) == 3,
        lambda net: len(net.inputs) == 2 and net.join == "cat",
        lambda net: len(net.inputs) == 2 and net.join == "mul",
        lambda net: any(getattr(source, "blocks", ()) for source in net.inputs),
        lambda net: len(net.heads) == 2 and net.named,
        lambda net: has(Residual)(net) and has(Split)(net),
        lambda net: has(Attention)(net) and has(Branches)(net),
        lambda net: any(isinstance(source, Images) and len(source.sizes) == 2 for source in net.inputs),
        lambda net: has(Residual)(net) and has(MixTokens)(net),
    ],
)
def test_programs_reach_combinations(condition: Callable[[Net], bool]) -> None:
    assert reached("programs", PROGRAMS, condition)


def test_kinds_and_bounds() -> None:
    only = testing.programs(kinds=("Activation",), max_blocks=1)
    assert minimal(only, lambda net: len(net.blocks) == 3 and has(Activation)(net)) == Net(
        (Linear(2), Activation(), Linear(2))
    )
    with pytest.raises(Exception, match=r"NoSuchExample|No examples"):
        find(only, has(Residual), settings=settings(REACH, max_examples=100))
    with pytest.raises(ArgumentError, match="kinds \\['Recurrent'\\] are not known"):
        testing.programs(kinds=("Recurrent",))
    with pytest.raises(ArgumentError, match="must not be negative"):
        testing.programs(max_blocks=-1)


def test_without_hypothesis_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fasp_fx.testing.strategies")
    monkeypatch.delitem(sys.modules, "fasp_fx.testing._drawing")
    monkeypatch.delattr(testing, "strategies")
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(testing.MissingExtraError, match=r"install fasp_fx\[testing\]") as caught:
        testing.programs()
    assert isinstance(caught.value, FaspError)
