"""Checking one model: what is held against it, what is said of it, and how a user adds it to a test run."""

import doctest
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from conftest import PROFILE
from hypothesis import HealthCheck, Phase, find, given, settings, strategies as st
from models import made
from mutants import not_run
from torch import nn
from torch.nn import functional as F

import fasp_fx
from fasp_fx import testing
from fasp_fx.analysis import ParameterSlice, PlannedGroup, PruningPlan
from fasp_fx.errors import ArgumentError, CaptureError, FaspError
from fasp_fx.testing import (
    INVARIANTS,
    CheckFailed,
    Masked,
    build,
    check_program,
    example,
    program_test,
    specs,
    strategies,
)
from fasp_fx.testing._net import blocks_of
from fasp_fx.testing.oracle import error, floats, kept
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
    Vectors,
)

CHAIN = Net((Linear(6), Activation(), Linear(4)))


def test_everything_holds_for_a_chain() -> None:
    verdict = check_program(build(CHAIN), example(CHAIN))
    assert verdict.ok
    assert set(verdict.checked) | {name for name, _ in verdict.skipped} == set(INVARIANTS)
    assert dict(verdict.skipped) == {"ties": "no weights are tied"}
    assert 0 < verdict.removed < 6
    assert verdict.calls >= 2
    assert verdict.error < 1e-4 < verdict.seen
    assert "mask-exact" in str(verdict)


def test_the_seed_chooses_what_goes() -> None:
    checked = [
        check_program(build(CHAIN), example(CHAIN), seed=seed, invariants=("mask-exact",))
        for seed in range(4)
    ]
    assert len({verdict.removed for verdict in checked}) > 1


def test_what_has_nothing_to_prune_is_said() -> None:
    net = Net((Linear(4), Norm("layer"), Scale(), Linear(2)))
    verdict = check_program(build(net), example(net), invariants=("mask-exact", "nothing"))
    assert verdict.checked == ("nothing",)
    assert dict(verdict.skipped)["mask-exact"] == "nothing of this model can be pruned"


#: rows of a fused projection that is a consumer too: restoration is held where the plan's names still are
#: those of the weights
SPLIT = Net(
    (Linear(8), Activation(), Attention(kv_heads=2, head_dim=4, projection="interleaved"), Linear(4)),
    (Sequences(width=4, tokens=8),),
)
KINDS: dict[str, tuple[Net, tuple[str, ...]]] = {
    "split consumers": (SPLIT, ("restored", "mask-exact")),
    "tied": (Net((Tied(4, "pair"),), (Sequences(3),)), ("mask-exact", "steps", "ties", "plan")),
    "images": (
        Net((Conv(4, 3), Activation(), Conv(3)), (Images(2, (4, 3)),)),
        ("mask-exact", "steps", "plan"),
    ),
    "exported": (CHAIN, ("mask-exact", "plan", "shapes")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds(kind: str) -> None:
    net, invariants = KINDS[kind]
    model: Any = build(net)
    if kind == "exported":
        model = torch.export.export(model, example(net), strict=False)
    assert check_program(model, example(net), invariants=invariants).checked == invariants


def test_a_broken_invariant_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    not_run(monkeypatch)  # or the library refuses to return what it made
    original = fasp_fx.capturing._program.Program.replace_weight
    monkeypatch.setattr(
        fasp_fx.capturing._program.Program,
        "replace_weight",
        lambda self, names, value: original(self, names, value.roll(1, 0)),
    )
    with pytest.raises(CheckFailed, match="NetModule \\(seed 0\\) breaks mask-exact: on inputs") as caught:
        check_program(build(CHAIN), example(CHAIN), invariants=("mask-exact", "signature"))
    verdict: Any = caught.value.verdict
    assert isinstance(caught.value, (AssertionError, fasp_fx.FaspError))
    assert not verdict.ok
    assert [broken.invariant for broken in verdict.broken] == ["mask-exact"]
    assert verdict.checked == ("signature",)


def test_a_wrong_rule_is_found_through_a_model() -> None:
    softmax = torch.ops.aten.softmax.int
    fasp_fx.patterns.register(softmax, "self[...] -> [...]")
    try:
        model = nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 2)).eval()
        with pytest.raises(
            CheckFailed, match=r"(?s)breaks mask-exact.*rules: aten\.softmax\.int.*claims too much"
        ):
            check_program(model, (torch.randn(3, 4),), invariants=("mask-exact", "rules"))
    finally:
        fasp_fx.patterns.unregister(softmax)


def test_what_cannot_be_checked_is_an_error_of_its_own() -> None:
    with pytest.raises(ArgumentError, match=r"invariants \['speed'\] are not known"):
        check_program(build(CHAIN), example(CHAIN), invariants=("speed",))
    with pytest.raises(CaptureError, match="training mode"):
        check_program(build(CHAIN).train(), example(CHAIN))
    with pytest.raises(ArgumentError):
        check_program(build(CHAIN), ())


test_one_line = program_test(lambda: (build(CHAIN), example(CHAIN)), invariants=("mask-exact",))


# --- the oracle itself, against models masked by hand


def plan(*consumers: ParameterSlice) -> PruningPlan:
    return PruningPlan("", (PlannedGroup("group", 4, 1, 1, (), consumers),), 0.0)


def test_columns_of_a_consumer_are_zero_and_the_model_is_untouched() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(4, 3)
    before = [parameter.clone() for parameter in model.parameters()]
    masked = Masked(model, plan(ParameterSlice("2.weight", 1, (0, 3))))
    hidden = torch.tanh(model[0](x)) * torch.tensor([0.0, 1, 1, 0, 1])
    assert error(masked(x), model[2](hidden)) < 1e-6
    assert error(masked(x), model(x)) > 1e-2
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))


def test_a_lookup_finds_the_whole_weight() -> None:
    """Embedding and head share a weight, whose columns the head consumes."""
    torch.manual_seed(0)
    model: Any = made(
        lambda self, tokens: self.head((found := self.embed(tokens)).tanh()) + found.sum(-1, keepdim=True),
        embed=nn.Embedding(7, 4),
        head=nn.Linear(4, 7, bias=False),
    )
    weight = model.head.weight = model.embed.weight
    tokens = torch.arange(6).reshape(2, 3)
    masked = Masked(model, plan(ParameterSlice("embed.weight", 1, (1,))))
    embedded = F.embedding(tokens, weight)
    expected = F.linear(torch.tanh(embedded) * torch.tensor([1.0, 0, 1, 1]), weight) + embedded.sum(
        -1, keepdim=True
    )
    assert error(masked(tokens), expected) < 1e-6
    exported = torch.export.export(model, (tokens,), strict=False)
    assert error(Masked(exported, plan(ParameterSlice("embed.weight", 1, (1,))))(tokens), expected) < 1e-6


def test_blocks_lose_their_own_positions() -> None:
    weight = torch.ones(2, 3, 4)
    mask = kept(weight, ParameterSlice("experts", 1, ((0,), (2,)), 0))  # type: ignore[arg-type]
    assert (mask[0, :, 0].tolist(), mask[1, :, 0].tolist()) == ([False, True, True], [True, True, False])
    rows = kept(torch.ones(4, 2), ParameterSlice("grouped", 1, ((0,), (1,)), 0))  # type: ignore[arg-type]
    assert rows.tolist() == [[False, True], [False, True], [True, False], [True, False]]


A, INF = torch.tensor([1.0, 2.0]), float("inf")
#: pairs of outputs, and how far they are apart
APART: list[tuple[Any, Any, float]] = [
    (A, A, 0),
    (A, torch.tensor([1.0, 4.0]), 0.5),
    (A, A[:1], INF),
    (torch.tensor([1.0, float("nan")]), A, INF),
    (torch.tensor([1.0, INF]), torch.tensor([1.0, INF]), 0),
    (torch.tensor([1.0, -INF]), torch.tensor([1.0, INF]), INF),
    ({"a": A, "n": torch.tensor(1)}, {"a": A, "n": torch.tensor(2)}, INF),
    ({"a": A, "n": torch.tensor(2)}, {"a": A, "n": torch.tensor(2)}, 0),
    (torch.tensor([1 + 1j]), torch.tensor([1 + 2j]), 0.5),
]


@pytest.mark.parametrize(("first", "second", "apart"), APART)
def test_errors(first: Any, second: Any, apart: float) -> None:
    assert error(first, second) == apart


# --- the strategies reach everything they promise, and shrink to two linear layers


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
        *[pytest.param(strategies.odd_nets, *case, marks=pytest.mark.slow) for case in WHAT_IS_ODD],
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
        ("odd", 4000, ODD),
        ("programs", PROGRAMS, OPTIONS),
        ("convolutional", 1200, CONVOLUTIONS),
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    monkeypatch.delattr(testing, "strategies")
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(testing.MissingExtraError, match=r"install fasp_fx\[testing\]") as caught:
        testing.programs()
    assert isinstance(caught.value, FaspError)


# --- specifications are data


BLOCKS = {name: getattr(specs, name) for name in specs.__all__}
NETS = [
    Net((Linear(2), Linear(2))),
    Net((Linear(4, bias=False), Activation("gelu"), Norm(), Scale(), Linear(3))),
    Net((Residual((Linear(3), Activation())), Move("pad"), Move("roll"), Linear(2)), (Vectors(4),)),
    Net((Linear(6), Gated(4, "glu"), Tied(3, "pair"), Tied(2, "transpose")), (Sequences(3, 4),)),
    Net((Branches(((), (Linear(3),))), Split(((Linear(2),), ()), "split", "cat")), (Vectors(3),)),
    Net(
        (Conv(4, 3), Norm("group", 2), SqueezeExcite(3), Pool(), Conv(8, 3, 2, depthwise=True), Collapse()),
        (Images(2, (6, 5)),),
    ),
    Net(
        (Conv(4, groups=2, transposed=True, stride=2), Norm("batch"), Resize(), Collapse("mean"), Linear(2)),
        (Images(),),
    ),
    Net((Conv(8), Resize("pixel_shuffle"), Norm("instance"), Collapse("mean")), (Images(2, (2, 3)),)),
    Net(
        (Attention(2, 2, 4, projection="fused", positions="rope"), Experts(3, 2, "top"), Norm("plain_rms")),
        (Tokens(5, 4, 3, True),),
        tied=True,
    ),
    Net(
        (Attention(3, projection="stacked"), MixTokens(5), Experts(3, 2, form="einsum")),
        (Sequences(4, 3),),
        heads=((Linear(2),), (Norm("rms"),)),
        named=True,
    ),
    Net(
        (Across("sort", 2), Foreign("fill"), Remember("blocks"), Reuse(3, "gram"), Pick(3, "twice")),
        (Vectors(4),),
    ),
    Net((Regroup("heads"), Sized("end"), Across("fourier", 4), Pick(2, "table"), Linear(2)), (Sequences(4),)),
    *[Net((Linear(4), Fused(3, kind), Linear(2)), (Sequences(4, 5),)) for kind in Fused.choices["kind"]],
    Net((Linear(2),), (Vectors(2), Vectors(3, (Linear(2),)), Vectors(2)), "mul", ((), (Linear(4),))),
]


@pytest.mark.parametrize("net", NETS, ids=str)
def test_prints_as_the_code_that_makes_it_and_builds_what_it_says(net: Net) -> None:
    assert (eval(repr(net), dict(BLOCKS)), hash(eval(repr(net), dict(BLOCKS)))) == (net, hash(net))
    model, inputs = build(net), example(net, batch=5)
    with torch.no_grad():
        found = floats(model(*inputs))
    for output, shape in zip(found, net.shapes(), strict=True):
        expected = (
            (shape.channels, *shape.sizes) if shape.layout == "image" else (*shape.sizes, shape.channels)
        )
        assert tuple(output.shape) == (5, *expected)
        assert bool(torch.isfinite(output).all())
    assert not any(module.training for module in model.modules())


def test_equal_seeds_give_equal_weights_and_inputs() -> None:
    net = NETS[1]
    first, again, other = (build(net, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(example(net, seed=1)[0], example(net, seed=1)[0])
    assert build(net, dtype=torch.float64)(*example(net, dtype=torch.float64)).dtype == torch.float64


def test_other_lengths() -> None:
    net = NETS[8]
    assert example(net, 2, tokens=7)[0].shape == (2, 7)
    assert build(net)(*example(net, 2, tokens=7)).shape == (2, 7, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Net((Conv(2),)), "takes image input"),
        (lambda: Net((Conv(3, groups=2),), (Images(2),)), "divide into 2 groups"),
        (lambda: Net((Norm("group", 2),), (Images(3),)), "do not divide"),
        (lambda: Net((Norm("instance"),), (Images(2, (1, 1)),)), "one position"),
        (lambda: Net((Activation("prelu"),), (Sequences(),)), "prelu"),
        (lambda: Net((Move("shuffle", 2),), (Vectors(3),)), "do not divide"),
        (lambda: Net((Pool(),), (Images(2, (1,)),)), "nothing left to pool"),
        (lambda: Net((Resize("pixel_shuffle"),), (Images(2, (2, 2)),)), "multiple of 4"),
        (lambda: Net((Split(((), ()), "chunk"),), (Vectors(3),)), "do not divide"),
        (lambda: Net((Branches(((), (Linear(3),)), "add"),)), "cannot be joined by 'add'"),
        (lambda: Net((Residual((Collapse(),)),), (Sequences(),)), "the body leads to"),
        (lambda: Net((), (Vectors(2), Vectors(3))), "cannot be joined by 'add'"),
        (lambda: Net((), (Vectors(2), Sequences(2))), "different shapes"),
        (lambda: Net((), ()), "one to three inputs"),
        (lambda: Net((), tied=True), "single input of tokens"),
        (lambda: Images(2, (2, 2, 2)), "one or two sizes"),
        (lambda: Net((Across("roll", 3),), (Vectors(4),)), "do not divide into 3 blocks"),
        (lambda: Net((Sized("select"),), (Sequences(2, 3),)), "more tokens than channels"),
        (lambda: Net((Regroup(),), (Vectors(4),)), "takes sequence input"),
        (lambda: Net((Fused(2),), (Vectors(4),)), "takes sequence input"),
        (lambda: Fused(2, "doors"), "kind='doors' is not known; use one of 'whole'"),
        (lambda: Fused(2, heads=0), "heads=0"),
        (lambda: Linear(0), "width=0"),
        (lambda: Activation("softplus"), "kind='softplus' is not known; use one of 'relu'"),
        (lambda: Attention(repeat=2, projection="stacked"), "does not go with projection='stacked'"),
        (lambda: Attention(head_dim=3, positions="rope"), "pairs of channels"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()  # type: ignore[operator]


def test_docstrings() -> None:
    assert doctest.testmod(specs).failed == 0
