"""Which rule an operator has: derived, built in, or the user's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fasp_fx
from fasp_fx import RuleError, patterns
from fasp_fx.analysis.channels._relation import Relation
from fasp_fx.patterns import lookup, parse, register, unregister


def test_registering() -> None:
    operator = torch.ops.aten.kthvalue.default
    try:
        rule = register(operator, "self[...]  ->  [...],[...];freeze @dim")
        assert str(rule) == "self[...] -> [...], [...]; freeze @dim"
        assert lookup(operator) is rule
    finally:
        unregister(operator)
    assert lookup(operator) is None
    built_in = lookup(torch.ops.aten.gelu.default)
    try:
        assert register(torch.ops.aten.gelu.default, "self[... c] -> [... c]; freeze c") != built_in
    finally:
        unregister(torch.ops.aten.gelu.default)
    assert lookup(torch.ops.aten.gelu.default) is built_in
    with pytest.raises(RuleError, match="exact overload"):
        register(torch.ops.aten.kthvalue, "self[...] -> [...]")
    with pytest.raises(RuleError, match=r"names \['weight'\]"):
        register(operator, "weight[...] -> [...]")
    assert lookup(operator) is None


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


VALID = {
    "linear": ("input[... i],weight[o i],bias[o]->[... o]", "input[... i], weight[o i], bias[o] -> [... o]"),
    "run_of_dimensions": (
        "x[... n*], w[n*] -> [... n*]; mix n*; shape s=n*",
        "x[... n*], w[n*] -> [... n*]; mix n*; shape s=n*",
    ),
    "alternatives": (
        "a[m k], b[k n] -> [m n] | a[k], b[k] -> []",
        "a[m k], b[k n] -> [m n] | a[k], b[k] -> []",
    ),
    "condition": ("a[x] -> [x] if flag | a[y] -> [y]", "a[x] -> [x] if flag | a[y] -> [y]"),
    "move": ("move self;shape size", "move self; shape size"),
    "part": ("move self; part dim start end", "move self; part dim start end"),
    "argument": ("self[...] -> [...]; reduce @dim", "self[...] -> [...]; reduce @dim"),
    "several_results": ("self[a b] -> [a], [b]", "self[a b] -> [a], [b]"),
    "check": ("check", "check"),
    "tensor_of_a_list": ("ws.0[a b] -> [a] if ws.1; only count 1", "ws.0[a b] -> [a] if ws.1; only count 1"),
    "recurrence": ("x[t i], w[(g h) i], u[(g h) k] -> [t h]; gates g 4; recur k h s second", None),
}

INVALID = {
    "empty": ("", 0),
    "no_result": ("x[a]", 4),
    "open_bracket": ("x[a -> [a]", 4),
    "letter_twice": ("x[a a] -> [a]", 4),
    "letter_from_nowhere": ("x[a] -> [b]", 11),
    "unknown_clause": ("x[a] -> [a]; melt a", 13),
    "too_few_words": ("move self; part dim", 19),
    "stray_character": ("x[a] -> [a] ?", 12),
    "argument_where_none_goes": ("move self; shape @size", 18),
    "left_over": ("move self self", 10),
    "no_number": ("x[(g h)] -> [h]; gates g four", 29),
    "nothing_created": ("create", 6),
    "letter_of_a_list": ("x[a.0] -> [a]", 2),
}


@pytest.mark.parametrize("name", VALID)
def test_valid_rules_print_normalised(name: str) -> None:
    text, printed = VALID[name][0], VALID[name][1] or VALID[name][0]
    rule = parse(text)
    assert str(rule) == printed
    assert parse(printed) == rule


@pytest.mark.parametrize("name", INVALID)
def test_invalid_rules_show_the_place(name: str) -> None:
    text, column = INVALID[name]
    with pytest.raises(fasp_fx.RuleError) as caught:
        parse(text)
    lines = str(caught.value).splitlines()
    assert lines[1].strip() == text.strip()
    assert lines[2].endswith("^")
    assert lines[2].index("^") - 2 == column


def test_every_built_in_rule_fits_its_operator() -> None:
    import torch
    import transformers.integrations.moe  # noqa: F401 (registers operators)

    for name, text in patterns.builtin().items():
        operator: Any = torch.ops
        for part in name.split("."):  # a higher-order operator has no overloads
            operator = getattr(operator, part)
        assert parse(text).names() <= patterns.argument_names(operator).keys(), f"{name}: {text}"
        assert patterns.lookup(operator) is not None
