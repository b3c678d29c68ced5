"""Operators nobody has seen: they freeze what they touch, are named in the report, and one line teaches the
library what they do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import Vectors, block, made, parameter, randomise
from oracle import assert_mask_exact
from torch import Tensor, nn

import fasp_fx
from fasp_fx.patterns import register, unregister

OPS = torch.ops.fasp_fx_tests


@torch.library.custom_op("fasp_fx_tests::wave", mutates_args=())
def wave(x: Tensor, weight: Tensor) -> Tensor:
    return torch.sin(x) * weight


@wave.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fasp_fx_tests::project", mutates_args=())
def project(x: Tensor, matrix: Tensor) -> Tensor:
    return x @ matrix


@project.register_fake
def _(x: Tensor, matrix: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], matrix.shape[1]))


def _beside(forward: Callable[..., Tensor], **held: Any) -> nn.Module:
    """A feed-forward block with something of its own, before another one."""
    return randomise(
        made(
            lambda self, x: (x := x + forward(self, x)) + block(self.second, x),
            up=nn.Linear(8, 12),
            **held,
            second=Vectors(8),
        )
    )


def _waves() -> nn.Module:
    """An operator of its own in the middle."""
    return _beside(
        lambda self, x: self.down(OPS.wave(self.up(x), self.scale)),
        down=nn.Linear(12, 8),
        scale=nn.Parameter(torch.ones(12)),
    )


def _projects() -> nn.Module:
    """The consumer itself is an operator nobody has seen."""
    return _beside(lambda self, x: OPS.project(self.up(x).relu(), self.matrix), matrix=parameter(12, 8))


def _between(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Linear layers with anything between the first and the second."""
    layers = (nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))
    return randomise(
        made(
            lambda self, x: self.down(function(self.up(x))), up=nn.Linear(8, 12), down=nn.Sequential(*layers)
        )
    )


@pytest.fixture
def taught() -> Iterator[None]:
    with (
        ruled(OPS.wave.default, "x[... c], weight[c] -> [... c]"),
        ruled(OPS.project.default, "x[... i], matrix[i o] -> [... o]"),
    ):
        yield


def data(batch: int) -> Tensor:
    return torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch))


def consumed(analysis: fasp_fx.Analysis) -> set[str]:
    return {member.name for group in analysis.select("prunable") for member in group.consumers}


def frozen(analysis: fasp_fx.Analysis) -> str:
    """Why the channels of the first layer stay."""
    (group,) = [g for g in analysis.groups if any(member.name == "up.bias" for member in g.producers)]
    assert group.status == "frozen"
    return group.reason


@contextlib.contextmanager
def ruled(operator: Any, text: str) -> Iterator[None]:
    register(operator, text)
    try:
        yield
    finally:
        unregister(operator)


@pytest.mark.parametrize(("make", "operator"), [(_waves, "wave"), (_projects, "project")])
def test_an_unknown_operator_freezes_and_is_named(make: Callable[[], nn.Module], operator: str) -> None:
    model = make()
    analysis = fasp_fx.analyze(model, (data(3),))
    assert consumed(analysis) == {"second.down.weight"}
    assert analysis.without_rule == {f"fasp_fx_tests.{operator}.default": 1}
    assert f"fasp_fx_tests.{operator}.default" in frozen(analysis)
    result = fasp_fx.prune(model, (data(3),), sparsity=0.5, score="random", restore=None)
    assert f"torch.ops.fasp_fx_tests.{operator}.default" in str(result.report)
    assert result.module.up.weight.shape == (12, 8)
    assert_mask_exact(model, result, lambda called: called(data(5)))


@torch.library.custom_op("fasp_fx_tests::sums", mutates_args=())
def sums(x: Tensor) -> Tensor:
    return x.cumsum(-1)


@sums.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    ("make", "operator", "rule", "says"),
    [
        (lambda: _between(OPS.sums), "sums", "move x", "computes other elements of those"),
        (_waves, "wave", "x[c], weight[c] -> [c]", "its rule does not speak of ('x' has 2 dimensions)"),
    ],
)
def test_what_a_rule_says_wrongly_freezes_and_is_said(
    make: Callable[[], nn.Module], operator: str, rule: str, says: str
) -> None:
    with ruled(getattr(OPS, operator).default, rule):
        assert says in frozen(fasp_fx.analyze(make(), (data(3),)))


@pytest.mark.usefixtures("taught")
def test_one_line_makes_it_prunable() -> None:
    model = _waves()
    analysis = fasp_fx.analyze(model, (data(3),))
    assert consumed(analysis) == {"down.weight", "second.down.weight"}
    assert not analysis.without_rule
    (group,) = [g for g in analysis.select("prunable") if g.name == "down.weight"]
    assert {m.name for m in group.producers} == {"up.weight", "up.bias", "scale"}
    for sparsity in (0.3, analysis.max_sparsity):
        result = fasp_fx.prune(model, (data(3),), sparsity=sparsity, score="random", restore=None)
        assert result.module.scale.shape[0] == result.module.up.weight.shape[0] < 12
        assert_mask_exact(model, result, lambda called: called(data(5)))


@pytest.mark.usefixtures("taught")
def test_a_contraction_is_taught_too() -> None:
    model = _projects()
    assert consumed(fasp_fx.analyze(model, (data(3),))) == {"matrix", "second.down.weight"}
    with pytest.warns(fasp_fx.CalibrationWarning, match=r"cannot be run backwards.*as is done now"):
        # The operator has no gradient.
        result = fasp_fx.prune(model, (data(40),), calibration=[data(40)], sparsity=0.4)
    removed = next(
        part.removed for group in result.plan.groups for part in group.consumers if part.name == "matrix"
    )
    assert result.module.matrix.shape == (12 - len(removed), 8)


@torch.library.custom_op("fasp_fx_tests::turn_", mutates_args=("x",))
def turn_(x: Tensor) -> None:
    x.copy_(x.flip(-1))


def test_the_line_that_would_teach_an_operator_can_be_run() -> None:
    result = fasp_fx.prune(_waves(), (data(3),), sparsity=0.5, score="random", restore=None)
    (note,) = result.report.notes
    line = note.partition("if it is pointwise, ")[2].removesuffix(" teaches it")
    exec(line, {"torch": torch, "fasp_fx": fasp_fx})
    try:
        assert not fasp_fx.analyze(_waves(), (data(3),)).without_rule
    finally:
        unregister(OPS.wave.default)


def _turned(x: Tensor) -> Tensor:
    x = x.clone()
    turn_(x)
    return x


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (_turned, "written by fasp_fx_tests.turn_.default"),
        (
            lambda x: nn.functional.one_hot((x > 0).long(), 2).to(x.dtype).sum(-1),
            "aten.one_hot.default is called in a way that its rule does not speak of",
        ),
    ],
    ids=["written", "tallied"],
)
def test_what_freezes_is_called_by_its_name(between: Callable[[Tensor], Tensor], reason: str) -> None:
    analysis = fasp_fx.analyze(_between(between), (data(3),))
    assert not analysis.without_rule
    assert frozen(analysis).startswith(reason)
