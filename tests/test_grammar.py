"""The grammar of operator rules."""

from __future__ import annotations

import pytest
import torch

from fasp_fx import RuleError
from fasp_fx.patterns import builtin, lookup, parse, register, unregister


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("input[... i], weight[o i], bias[o] -> [... o]", None),
        ("input[...i],weight[o i]->[...o]", "input[... i], weight[o i] -> [... o]"),
        ("self[m k], mat2[k n] -> [m n]", None),
        ("self[... m k], other[... k n] -> [... m n] | self[k], other[k] -> []", None),
        ("q[... k], v[k] -> [... k] if flag", None),
        ("x[... n*], weight[n*] -> [... n*]; mix n*; shape normalized_shape=n*", None),
        ("self[...] -> [...]; reduce @dim", None),
        ("self[...] -> [...];freeze   @dim", "self[...] -> [...]; freeze @dim"),
        ("a[x], b[y] -> [x], [y]", None),
        ("a[g h] -> [h]; repeat g h", None),
        ("move self", None),
        ("move self; span dim start end", None),
        ("move self; pick dim index", None),
        ("move self; sizes split_sizes dim; chunk chunks dim", None),
        ("move self; shape size", None),
        ("check", None),
    ],
)
def test_valid_rules(text: str, normal: str | None) -> None:
    rule = parse(text)
    assert str(rule) == (normal or text)
    assert parse(str(rule)) == rule


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


@pytest.mark.parametrize(
    ("text", "at", "message"),
    [
        ("", 0, "expected a name"),
        ("input", 5, "expected '['"),
        ("input[i -> [i]", 8, "expected a letter"),
        ("input[i] [i]", 9, "expected '->'"),
        ("input[i] -> i", 12, "expected '['"),
        ("input[i i] -> [i]", 8, "stands twice"),
        ("input[... i ...] -> [i]", 12, "stands twice"),
        ("input[i] -> [o]", 15, "in no operand"),
        ("input[i] -> [i]; shrink i", 17, "expected one of"),
        ("input[i] -> [i]; shape @size", 24, "'@' is not allowed"),
        ("input[i] -> [i]; repeat i", 25, "takes 2 word"),
        ("input[i] -> [i]; span dim start", 31, "takes 3 word"),
        ("input[i] -> [i]; mix", 20, "unexpected end"),
        ("input[i] -> [i] extra", 16, "expected ';'"),
        ("input[i] -> [i] $", 16, "unexpected character"),
        ("input[i] -> [i] |", 17, "expected a name"),
        ("move", 4, "expected a name"),
        ("move self; ", 11, "expected one of"),
        ("check [i]", 6, "expected ';'"),
    ],
)
def test_invalid_rules_point_at_the_place(text: str, at: int, message: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse(text)
    first, shown, caret = str(caught.value).split("\n")
    assert message in first
    assert shown == f"  {text}"
    assert caret.strip() == "^"
    assert caret.index("^") - 2 == at


def _operator(name: str) -> object:
    found: object = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", sorted(builtin()))
def test_built_in_rules_fit_their_operators(name: str) -> None:
    operator = _operator(name)
    rule = parse(builtin()[name])
    assert rule.names() <= {argument.name for argument in operator._schema.arguments}
    if rule.alternatives:
        assert {len(alternative.results) for alternative in rule.alternatives} <= set(range(1, len(operator._schema.returns) + 1))
    assert lookup(operator) == rule


def test_pointwise_rules_are_derived() -> None:
    assert str(lookup(torch.ops.aten.gelu.default)) == "self[...] -> [...]"
    assert str(lookup(torch.ops.aten.mul.Tensor)) == "self[...], other[...] -> [...]"
    assert str(lookup(torch.ops.aten.where.self)) == "condition[...], self[...], other[...] -> [...]"
    assert lookup(torch.ops.aten.sort.default) is None
    assert lookup(len) is None


def test_registering() -> None:
    operator = torch.ops.aten.sort.default
    try:
        rule = register(operator, "self[...]  ->  [...],[...];freeze @dim")
        assert str(rule) == "self[...] -> [...], [...]; freeze @dim"
        assert lookup(operator) is rule
    finally:
        unregister(operator)
    assert lookup(operator) is None
    unregister(operator)  # a second time is harmless
    with pytest.raises(RuleError, match="exact overload"):
        register(torch.ops.aten.sort, "self[...] -> [...]")
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
