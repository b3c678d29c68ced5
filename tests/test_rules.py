"""Operators nobody has seen: they freeze what they touch, are named in the report, and one line teaches the
library what they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import assert_mask_exact
from torch import Tensor, nn
from zoo import randomise

import fasp_fx
from fasp_fx.patterns import register, unregister

pytestmark = pytest.mark.usefixtures("shared_captures")


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


@torch.library.custom_op("fasp_fx_tests::halves", mutates_args=())
def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.chunk(2, -1)[0].clone(), x.chunk(2, -1)[1].clone()


@halves.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    half = (*x.shape[:-1], x.shape[-1] // 2)
    return x.new_empty(half), x.new_empty(half)


class Waves(nn.Module):
    """Two feed-forward blocks, the first with an operator of its own in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.scale = nn.Parameter(torch.ones(12))
        self.second_up, self.second_down = nn.Linear(8, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.ops.fasp_fx_tests.wave(self.up(x), self.scale))
        return x + self.second_down(self.second_up(x).relu())


class Projects(nn.Module):
    """The consumer itself is an operator nobody has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.matrix = nn.Linear(8, 12), nn.Parameter(torch.ones(12, 8))
        self.second_up, self.second_down = nn.Linear(8, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.ops.fasp_fx_tests.project(self.up(x).relu(), self.matrix)
        return x + self.second_down(self.second_up(x).relu())


class Halves(nn.Module):
    """An operator with two results."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(6, 8)
        self.second_up, self.second_down = nn.Linear(8, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.ops.fasp_fx_tests.halves(self.up(x))
        x = x + self.down(first * second)
        return x + self.second_down(self.second_up(x).relu())


@pytest.fixture
def taught() -> Iterator[None]:
    register(torch.ops.fasp_fx_tests.wave.default, "x[... c], weight[c] -> [... c]")
    register(torch.ops.fasp_fx_tests.project.default, "x[... i], matrix[i o] -> [... o]")
    yield
    for operator in (torch.ops.fasp_fx_tests.wave.default, torch.ops.fasp_fx_tests.project.default):
        unregister(operator)


def data(batch: int) -> Tensor:
    return torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch))


def consumed(analysis: fasp_fx.Analysis) -> set[str]:
    return {member.name for group in analysis.select("prunable") for member in group.consumers}


@pytest.mark.parametrize(("kind", "operator"), [(Waves, "wave"), (Projects, "project"), (Halves, "halves")])
def test_an_unknown_operator_freezes_and_is_named(kind: type[nn.Module], operator: str) -> None:
    model = randomise(kind())
    analysis = fasp_fx.analyze(model, (data(3),))
    assert consumed(analysis) == {"second_down.weight"}
    assert analysis.without_rule == {f"fasp_fx_tests.{operator}.default": 1}
    (group,) = [g for g in analysis.groups if any(m.name == "up.bias" for m in g.producers)]
    assert group.status == "frozen"
    assert f"fasp_fx_tests.{operator}.default" in group.reason
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


@torch.library.custom_op("fasp_fx_tests::total", mutates_args=())
def total(x: list[Tensor]) -> Tensor:
    return torch.stack(x).sum(0)


@total.register_fake
def _(x: list[Tensor]) -> Tensor:
    return torch.empty_like(x[0])


class Computes(nn.Module):
    """An operator of one tensor, or of a list of two, that computes what it returns."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        self.up, self.down, self.listed = nn.Linear(8, 12), nn.Linear(12, 8), listed

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        found = (
            torch.ops.fasp_fx_tests.total([x, x.tanh()]) if self.listed else torch.ops.fasp_fx_tests.sums(x)
        )
        return self.down(found)


@pytest.mark.parametrize("listed", [False, True])
def test_what_computes_freezes_though_its_rule_says_that_it_moves(listed: bool) -> None:
    operator = torch.ops.fasp_fx_tests.total.default if listed else torch.ops.fasp_fx_tests.sums.default
    register(operator, "move x")
    try:
        groups = fasp_fx.analyze(randomise(Computes(listed)), (data(3),)).groups
    finally:
        unregister(operator)
    (group,) = [group for group in groups if any(m.name == "up.bias" for m in group.producers)]
    assert group.status == "frozen"
    assert "computes other elements of those that it is said to move" in group.reason


def test_what_is_spelled_with_too_few_letters_freezes_and_says_so() -> None:
    operator = torch.ops.fasp_fx_tests.wave.default
    register(operator, "x[c], weight[c] -> [c]")
    try:
        groups = fasp_fx.analyze(randomise(Waves()), (data(3),)).groups
    finally:
        unregister(operator)
    (group,) = [group for group in groups if any(m.name == "up.bias" for m in group.producers)]
    assert group.status == "frozen"
    assert "its rule does not speak of ('x' has 2 dimensions)" in group.reason


@pytest.mark.usefixtures("taught")
def test_one_line_makes_it_prunable() -> None:
    model = randomise(Waves())
    analysis = fasp_fx.analyze(model, (data(3),))
    assert consumed(analysis) == {"down.weight", "second_down.weight"}
    assert not analysis.without_rule
    (group,) = [g for g in analysis.select("prunable") if g.name == "down.weight"]
    assert {m.name for m in group.producers} == {"up.weight", "up.bias", "scale"}
    for sparsity in (0.3, analysis.max_sparsity):
        result = fasp_fx.prune(model, (data(3),), sparsity=sparsity, score="random", restore=None)
        assert result.module.scale.shape[0] == result.module.up.weight.shape[0] < 12
        assert_mask_exact(model, result, lambda called: called(data(5)))


@pytest.mark.usefixtures("taught")
def test_a_contraction_is_taught_too() -> None:
    model = randomise(Projects())
    assert consumed(fasp_fx.analyze(model, (data(3),))) == {"matrix", "second_down.weight"}
    with pytest.warns(fasp_fx.CalibrationWarning, match=r"cannot be run backwards.*as is done now"):
        # The operator has no gradient.
        result = fasp_fx.prune(model, (data(40),), calibration=[data(40)], sparsity=0.4)
    removed = next(
        part.removed for group in result.plan.groups for part in group.consumers if part.name == "matrix"
    )
    assert result.module.matrix.shape == (12 - len(removed), 8)
    # restored on the calibration data, it is closer to the dense model than the cut alone
    with torch.no_grad():
        dense = model(data(40))
        cut = fasp_fx.apply(model, result.plan, (data(40),)).module(data(40))
        assert (result.module(data(40)) - dense).norm() < (cut - dense).norm()


@pytest.mark.usefixtures("taught")
def test_rules_are_forgotten() -> None:
    unregister(torch.ops.fasp_fx_tests.wave.default)
    assert consumed(fasp_fx.analyze(randomise(Waves()), (data(3),))) == {"second_down.weight"}


def test_nothing_prunable_says_why() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.scale = nn.Linear(8, 12), nn.Linear(12, 8), nn.Parameter(torch.ones(12))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.ops.fasp_fx_tests.wave(self.up(x), self.scale))

    model = randomise(Only())
    with pytest.raises(fasp_fx.NothingPrunableError, match=r"fasp_fx_tests\.wave"):
        fasp_fx.prune(model, (data(3),), score="random", restore=None)


@torch.library.custom_op("fasp_fx_tests::turn_", mutates_args=("x",))
def turn_(x: Tensor) -> None:
    x.copy_(x.flip(-1))


class Between(nn.Module):
    """A feed-forward block with anything in the middle."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mid(self.between(self.up(x))).relu())


def test_the_line_that_would_teach_an_operator_can_be_run() -> None:
    result = fasp_fx.prune(randomise(Waves()), (data(3),), sparsity=0.5, score="random", restore=None)
    (note,) = result.report.notes
    line = note.partition("if it is pointwise, ")[2].removesuffix(" teaches it")
    exec(line, {"torch": torch, "fasp_fx": fasp_fx})
    try:
        assert not fasp_fx.analyze(Waves().eval(), (data(3),)).without_rule
    finally:
        unregister(torch.ops.fasp_fx_tests.wave.default)


def test_no_line_teaches_a_higher_order_operator() -> None:
    def choose(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    result = fasp_fx.prune(Between(choose).eval(), (data(3),), sparsity=0.5, score="random", restore=None)
    (note,) = result.report.notes
    assert note.startswith("cond has no rule")
    assert "register" not in note


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
    analysis = fasp_fx.analyze(Between(between).eval(), (data(3),))
    assert not analysis.without_rule
    (group,) = [group for group in analysis.groups if any(m.name == "up.bias" for m in group.producers)]
    assert group.reason.startswith(reason)
