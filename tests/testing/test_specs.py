"""Specifications are data: they print as the code that makes them, refuse what does not fit, and build what
they say.
"""

from __future__ import annotations

import doctest

import pytest
import torch

from fasp_fx.errors import ArgumentError
from fasp_fx.testing import build, example, specs
from fasp_fx.testing.oracle import floats
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

PUBLIC = {name: getattr(specs, name) for name in specs.__all__}
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
    assert eval(repr(net), dict(PUBLIC)) == net
    assert hash(eval(repr(net), dict(PUBLIC))) == hash(net)
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
