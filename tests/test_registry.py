"""Which rule an operator has: derived, built in, or the user's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fasp_fx
from fasp_fx import RuleError
from fasp_fx.analysis.channels._letters import Relation
from fasp_fx.patterns import lookup, parse, register, unregister


def test_what_a_rule_says() -> None:
    rule = parse("input[... i], weight[o i], bias[o] -> [... o] if flag; mix o; freeze @dim")
    (alternative,) = rule.alternatives
    assert [operand.name for operand in alternative.operands] == ["input", "weight", "bias"]
    assert alternative.operands[1].dims == ("o", "i")
    assert alternative.results == (("...", "o"),)
    assert alternative.condition == "flag"
    assert rule.names() == {"input", "weight", "bias", "flag", "dim"}
    assert [clause.words for clause in rule.all("mix")] == [("o",)]
    assert parse("move self; span dim start end").names() == {"self", "dim", "start", "end"}


def test_pointwise_rules_are_derived() -> None:
    assert str(lookup(torch.ops.aten.gelu.default)) == "self[...] -> [...]"
    assert str(lookup(torch.ops.aten.mul.Tensor)) == "self[...], other[...] -> [...]"
    assert str(lookup(torch.ops.aten.where.self)) == "condition[...], self[...], other[...] -> [...]"
    assert lookup(torch.ops.aten.kthvalue.default) is None
    assert lookup(len) is None


def test_registering() -> None:
    operator = torch.ops.aten.kthvalue.default
    try:
        rule = register(operator, "self[...]  ->  [...],[...];freeze @dim")
        assert str(rule) == "self[...] -> [...], [...]; freeze @dim"
        assert lookup(operator) is rule
    finally:
        unregister(operator)
    assert lookup(operator) is None
    unregister(operator)  # a second time is harmless
    with pytest.raises(RuleError, match="exact overload"):
        register(torch.ops.aten.kthvalue, "self[...] -> [...]")
    with pytest.raises(RuleError, match=r"names \['weight'\]"):
        register(operator, "weight[...] -> [...]")
    assert lookup(operator) is None


def test_a_users_rule_replaces_the_built_in_one() -> None:
    operator = torch.ops.aten.gelu.default
    before = lookup(operator)
    try:
        register(operator, "self[... c] -> [... c]; freeze c")
        assert lookup(operator) != before
    finally:
        unregister(operator)
    assert lookup(operator) == before


@pytest.mark.parametrize(
    ("raised", "expected", "text"),
    [
        (
            TypeError("it is none"),
            RuleError,
            r"rule of aten.linear.default fails at node 'linear'.*it is none",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "CUDA out of memory"),
    ],
)
def test_what_goes_wrong_within_a_rule_is_no_reason_to_freeze(
    raised: Exception, expected: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(relation: Relation) -> None:
        raise raised

    monkeypatch.setattr(Relation, "run", fails)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with pytest.raises(expected, match=text):
        fasp_fx.analyze(model, (torch.randn(2, 4),))
