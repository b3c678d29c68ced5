"""Every rule is right, wrong ones are told apart, and the counter-example is small and says where."""

import importlib
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from conftest import PROFILE
from mutants import ACROSS
from torch import Tensor
from torch._ops import OpOverload

from fasp_fx import patterns
from fasp_fx.errors import ArgumentError, RuleError
from fasp_fx.testing import CheckFailed, CounterExample, assert_rule, check_rule, rule as rule_module

SLOW = PROFILE == "slow"
#: calls per rule; in the slow profile all rules together are held against more than 100,000
EXAMPLES = 260 if SLOW else 2
#: around which share of them a program is pruned
PROGRAMS = 0.25 if SLOW else 1.0
ATEN = torch.ops.aten


#: modules that define operators of their own when they are imported
_DEFINING = {"transformers": "transformers.integrations.moe"}


def operator(name: str) -> OpOverload | None:
    """The overload of this name, or ``None`` if this version of torch lacks it."""
    space, packet, overload = name.split(".")
    if space in _DEFINING:
        importlib.import_module(_DEFINING[space])
    found: Any = getattr(getattr(torch.ops, space), packet, None)
    return getattr(found, overload, None)


@cache
def written() -> tuple[str, ...]:
    """Operators with a rule that is written out, and that this version of torch has; those that take graphs
    have tests of their own.
    """
    return tuple(
        name
        for name in patterns.builtin()
        if not name.startswith("higher_order.") and operator(name) is not None
    )


@cache
def derived() -> tuple[str, ...]:
    """Functional operators of aten whose rule is derived, and that return a tensor."""
    found = []
    for packet in map(str, dir(torch.ops.aten)):
        overloads = getattr(getattr(torch.ops.aten, packet), "overloads", None)
        for overload in overloads() if overloads is not None else ():
            name = f"aten.{packet}.{overload}"
            one = operator(name)
            if (
                one is None
                or one._schema.is_mutable
                or name in patterns.builtin()
                or patterns.lookup(one) is None
            ):
                continue
            if any("Tensor" in str(result.type) for result in one._schema.returns):
                found.append(name)
    return tuple(found)


@pytest.mark.parametrize("name", [*written(), *(derived() if SLOW else derived()[::16])])
def test_every_rule_is_right(name: str) -> None:
    verdict = check_rule(operator(name), examples=EXAMPLES, seed=EXAMPLES, programs=PROGRAMS)
    assert verdict.ok, str(verdict)
    assert not verdict.refused, verdict.refused[0]
    assert verdict.examples


WRONG: list[tuple[Any, str, str]] = [
    # what mixes is said to keep apart
    (ATEN.softmax.int, "self[...] -> [...]", "depends on position"),
    (ATEN.cumsum.default, "self[...] -> [...]", "depends on position"),
    (ATEN.sort.default, "self[...] -> [...], [...]", "depends on position"),
    (
        ATEN.layer_norm.default,
        "input[... n*], weight[n*], bias[n*] -> [... n*]; shape normalized_shape=n*",
        "without positions",
    ),
    # dimensions are confused
    (ATEN.mm.default, "self[m k], mat2[k n] -> [n m]", "has shape"),
    (ATEN.mm.default, "self[k m], mat2[k n] -> [m n]", "contracted|refuses"),
    (ATEN.linear.default, "input[... i], weight[i o], bias[o] -> [... o]", "contracted|refuses"),
    (ATEN.transpose.int, "self[... a b] -> [... b a]", "has shape|depends"),
    (ATEN.flip.default, "self[...] -> [...]", "instead of"),
    # an operand is forgotten
    (ATEN.add.Tensor, "self[...] -> [...]", "has shape"),
    (ATEN.linear.default, "input[... i], weight[o i] -> [... o]", "refuses"),
    # an argument is forgotten
    (
        ATEN.layer_norm.default,
        "input[... n*], weight[n*], bias[n*] -> [... n*]; mix n*",
        "refuses|without positions",
    ),
    (ATEN.view.default, "move self", "does not run|refused"),
    (ATEN.split_with_sizes.default, "move self", "does not run|refused"),
    (ATEN.index_select.default, "move self", "does not run|refused|error against"),
    # what computes is said to move
    (ATEN.gelu.default, "move self", "integers"),
    (ATEN.neg.default, "move self", "no element of 'self'"),
    (ATEN.mul.Scalar, "move self", "no element of 'self'|holds other elements"),
    (ATEN.mul.Tensor, "check", "it returns Tensor"),
]


def counter(op: Any, rule: str | None = None, **options: Any) -> CounterExample:
    """The smallest call that shows that a rule claims too much."""
    verdict = check_rule(op, rule, **options)
    assert verdict.kind == "claims too much"
    assert verdict.counter is not None
    assert str(verdict.counter) in str(verdict)
    return verdict.counter


@pytest.mark.parametrize(
    ("op", "rule", "fact"), WRONG if SLOW else WRONG[::2], ids=lambda value: str(value)[:40]
)
def test_what_claims_too_much_is_told(op: Any, rule: str, fact: str) -> None:
    before = patterns.lookup(op)
    found = counter(op, rule, examples=60)
    assert re.search(fact, found.fact), found.fact
    assert sum(value.numel() for value in found.arguments.values() if isinstance(value, Tensor)) <= 16
    assert patterns.lookup(op) == before, "the rule in force is what it was"


@pytest.mark.parametrize(
    ("op", "rule", "needless"),
    [
        (ATEN.relu.default, "self[... c] -> [... c]; mix c", "mix c"),
        (ATEN.relu.default, "self[... c] -> [... c]; freeze c", "freeze c"),
        (ATEN.bmm.default, "self[b m k], mat2[b k n] -> [b m n]; mix b", "mix b"),
        (ATEN.bmm.default, "self[b m k], mat2[b k n] -> [b m n]; freeze n", "freeze n"),
    ],
)
def test_what_claims_too_little_is_told(op: Any, rule: str, needless: str) -> None:
    verdict = check_rule(op, rule, examples=40)
    assert (verdict.kind, verdict.needless, verdict.counter) == ("claims too little", (needless,), None)
    assert f"does not need '{needless}'" in str(verdict)


@pytest.mark.parametrize(
    "op",
    [ATEN.roll.default, pytest.param(ATEN.cumsum.default, marks=pytest.mark.slow), ATEN.sort.default],
    ids=str,
)
def test_other_positions_in_every_block_are_tried(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that does not hold positions together across what an operator orders or shifts is found out
    by the programs around it.
    """
    assert check_rule(op, examples=60).ok
    ACROSS.patch(monkeypatch)
    monkeypatch.setattr(rule_module, "_SEARCH", 1)
    assert "error against the masked program" in counter(op, examples=300).fact


@pytest.mark.parametrize("op", [ATEN.roll.default, ATEN.cumsum.default], ids=str)
def test_a_rule_without_its_clause_is_found_out_by_programs_alone(
    op: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rule_module._Check, "_claims", lambda *_: None)
    assert check_rule(op, examples=40).ok
    assert "error against the masked program" in counter(op, "self[...] -> [...]", examples=40).fact


LOOKS = "self[...] -> [...]; window ...; index @dim index"


def test_positions_that_integers_name() -> None:
    """A rule that names positions which come back claims too much."""
    assert check_rule(ATEN.gather.default, examples=40).ok
    for op in (ATEN.scatter_add.default, ATEN.index_add.default, ATEN.index_copy.default):
        found = counter(op, LOOKS, examples=40)
        assert (found.claim, found.arguments["self"].numel()) == ("index @dim index", 2)
        assert "which no integer names" in found.fact


def test_integers_that_name_the_next_position() -> None:
    """A lookup that is off by one, as only the numbers show."""

    def shifted(x: Tensor, dim: int, index: Tensor) -> Tensor:
        return x.gather(dim, (index + 1) % x.shape[dim])

    op = torch.library.custom_op("fasp_fx_test::shifted", mutates_args=())(shifted)._opoverload
    samples = [((torch.randn(3), 0, torch.tensor([0, 1])), {})] * 8
    found = counter(op, LOOKS.replace("self", "x"), samples=samples, programs=0.0)
    assert found.claim == "index @dim index"


def test_a_rule_that_does_not_fit_is_too_little() -> None:
    """The analysis does not use it, and freezes."""
    verdict = check_rule(ATEN.max.dim, "self[...] -> [...]; reduce @dim", examples=20)
    assert verdict.kind == "claims too little"
    assert verdict.counter is not None
    assert "returns 2 tensors, the rule speaks of 1" in verdict.counter.fact


def test_the_smallest_counter_example_says_where() -> None:
    found = counter(ATEN.softmax.int, "self[...] -> [...]", examples=60)
    assert (found.call, found.arguments["self"].shape) == ("aten.softmax.int(self=<2>, dim=0)", (2,))
    assert "result 0 at (1,) depends on position 0" in found.fact


def test_assert_rule_raises_the_verdict() -> None:
    assert assert_rule(ATEN.linear.default, examples=10).ok
    with pytest.raises(CheckFailed, match="claims too much") as caught:
        assert_rule(ATEN.softmax.int, "self[...] -> [...]", examples=30)
    assert isinstance(caught.value, AssertionError)
    assert caught.value.verdict.operator == "aten.softmax.int"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("op", "options", "error", "message"),
    [
        (ATEN.relu.default, {"rule": "self[... c -> [c]"}, RuleError, r"(?s)self\[\.\.\. c -> \[c\].*\^"),
        (ATEN.relu.default, {"rule": "x[...] -> [...]"}, RuleError, "names \\['x'\\]"),
        (ATEN.relu, {"rule": "self[...] -> [...]"}, RuleError, "exact overload"),
        (ATEN.nonzero.default, {}, RuleError, r"there is no rule for aten\.nonzero\.default"),
        (ATEN.relu.default, {"examples": 0}, ArgumentError, "examples=0"),
    ],
)
def test_what_cannot_be_checked_is_refused(
    op: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_rule(op, **options)


@torch.library.custom_op("fasp_fx_testing_tests::blend", mutates_args=())
def blend(x: Tensor, weight: Tensor, mode: str) -> Tensor:
    if mode != "soft":
        raise ValueError(f"mode {mode} is not known")
    return torch.sigmoid(x) * weight


@blend.register_fake
def _(x: Tensor, weight: Tensor, mode: str) -> Tensor:
    return x.new_empty(x.shape)


@pytest.fixture
def taught() -> Iterator[Any]:
    op = torch.ops.fasp_fx_testing_tests.blend.default
    patterns.register(op, "x[... c], weight[c] -> [... c]")
    yield op
    patterns.unregister(op)


def test_operators_of_the_users_own(taught: Any) -> None:
    with pytest.raises(ArgumentError, match="give some as samples="):
        check_rule(taught)
    samples = [
        ((torch.randn(*lead, size), torch.randn(size)), {"mode": "soft"})
        for size in (2, 3, 4)
        for lead in ((), (2,), (3, 2))
    ]
    verdict = check_rule(taught, samples=samples)
    assert verdict.ok, str(verdict)
    assert (verdict.examples, verdict.rule) == (9, "x[... c], weight[c] -> [... c]")
    assert counter(taught, "x[... c] -> [... c]", samples=samples).arguments["x"].numel() == 2
    assert str(patterns.lookup(taught)) == "x[... c], weight[c] -> [... c]"
    with pytest.raises(ArgumentError, match="does not fit"):
        check_rule(taught, samples=[((), {"y": 1})])


@torch.library.custom_op("fasp_fx_test::centred", mutates_args=())
def _centred(x: Tensor, mix: bool = False) -> Tensor:
    return x - x.mean(-1, keepdim=True) if mix else x * 2


@_centred.register_fake
def _(x: Tensor, mix: bool = False) -> Tensor:
    return torch.empty_like(x)


def test_a_rule_of_some_calls_alone_is_not_asked_of_others() -> None:
    op = torch.ops.fasp_fx_test.centred.default
    verdict = check_rule(op, "x[... c] -> [... c]; only mix 0", examples=40)
    assert verdict.ok, str(verdict)
    assert check_rule(op, "x[... c] -> [... c]", examples=40).kind == "claims too much"
    assert check_rule(op, "x[... c] -> [... c]; only mix 1", examples=40).kind == "claims too much"
