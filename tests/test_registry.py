"""Which rule an operator has: derived, built in, or the user's."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import Vectors, block, made, randomise
from oracle import assert_exact
from torch import Tensor, nn
from torch.library import custom_op

import fasp_fx
from fasp_fx import RuleError, patterns
from fasp_fx.allocation import Macs, macs_of
from fasp_fx.analysis.channels._relation import Relation
from fasp_fx.patterns import Affine, affine, lookup, parse, register, unregister


def test_registering() -> None:
    operator = torch.ops.aten.kthvalue.default
    with ruled(operator, "self[...]  ->  [...],[...];freeze @dim") as rule:
        assert str(rule) == "self[...] -> [...], [...]; freeze @dim"
        assert lookup(operator) is rule
    assert lookup(operator) is None
    built_in = lookup(torch.ops.aten.gelu.default)
    with ruled(torch.ops.aten.gelu.default, "self[... c] -> [... c]; freeze c") as rule:
        assert rule != built_in
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
    assert (str(rule), parse(printed)) == (printed, rule)


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


# --- operators nobody has seen


OPS = torch.ops.fasp_fx_tests
#: operators of our own, by their schema
COMPUTED: dict[str, Callable[..., Tensor]] = {
    "wave(Tensor x, Tensor weight) -> Tensor": lambda x, weight: torch.sin(x) * weight,
    "sums(Tensor x) -> Tensor": lambda x: x.cumsum(-1),
    "affinely(Tensor x, Tensor w, Tensor b) -> Tensor": lambda x, w, b: x @ w + b,
    "scaled(Tensor x, Tensor w, Tensor b) -> Tensor": lambda x, w, b: x @ w * b,
}
for name, schema, compute in ((*text.partition("(")[::2], compute) for text, compute in COMPUTED.items()):
    operator = custom_op(f"fasp_fx_tests::{name}", compute, mutates_args=(), schema=f"({schema}")
    operator.register_fake(compute)


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


def _between(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Linear layers with anything between the first and the second."""
    layers = (nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))
    return randomise(
        made(
            lambda self, x: self.down(function(self.up(x))), up=nn.Linear(8, 12), down=nn.Sequential(*layers)
        )
    )


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
def ruled(operator: Any, text: str) -> Iterator[Any]:
    rule = register(operator, text)
    try:
        yield rule
    finally:
        unregister(operator)


def test_an_unknown_operator_freezes_and_is_named() -> None:
    model = _waves()
    analysis = fasp_fx.analyze(model, (data(3),))
    assert consumed(analysis) == {"second.down.weight"}
    assert analysis.without_rule == {"fasp_fx_tests.wave.default": 1}
    assert "fasp_fx_tests.wave.default" in frozen(analysis)
    result = fasp_fx.prune(model, (data(3),), sparsity=0.5, score="random", restore=None)
    assert "torch.ops.fasp_fx_tests.wave.default" in str(result.report)
    assert result.module.up.weight.shape == (12, 8)
    assert_exact(model, result, data(5))


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


def test_one_line_makes_it_prunable() -> None:
    model = _waves()
    with ruled(OPS.wave.default, "x[... c], weight[c] -> [... c]"):
        analysis = fasp_fx.analyze(model, (data(3),))
        assert consumed(analysis) == {"down.weight", "second.down.weight"}
        assert not analysis.without_rule
        (group,) = [g for g in analysis.select("prunable") if g.name == "down.weight"]
        assert {m.name for m in group.producers} == {"up.weight", "up.bias", "scale"}
        for sparsity in (0.3, analysis.max_sparsity):
            how: dict[str, Any] = {"score": "random", "restore": None, "round_to": 1}
            result = fasp_fx.prune(model, (data(3),), sparsity=sparsity, **how)
            assert result.module.scale.shape[0] == result.module.up.weight.shape[0] < 12
            assert_exact(model, result, data(5))


@custom_op("fasp_fx_tests::turn_", mutates_args=("x",))
def turn_(x: Tensor) -> None:
    x.copy_(x.flip(-1))


def test_the_line_that_would_teach_an_operator_can_be_run() -> None:
    result = fasp_fx.prune(_waves(), (data(3),), sparsity=0.5, score="random", restore=None)
    (note,) = result.report.notes
    exec(
        note.partition("if it is pointwise, ")[2].removesuffix(" teaches it"),
        {"torch": torch, "fasp_fx": fasp_fx},
    )
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


# --- one rule is all that is known of an operator


RULE = "x[... i], w[i o], b[o] -> [... o]"
AFFINELY, SCALED = torch.ops.fasp_fx_tests.affinely.default, torch.ops.fasp_fx_tests.scaled.default
BATCHES = [torch.randn(64, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]


@pytest.fixture
def products() -> Iterator[None]:
    """A product to which a bias is added, and one which is scaled, are known by their rule."""
    with ruled(AFFINELY, RULE), ruled(SCALED, RULE):
        yield


def model(operator: Any) -> nn.Module:
    """Every second neuron is always one, which a bias can stand for."""
    torch.manual_seed(0)
    weights = {"w": nn.Parameter(torch.randn(12, 4)), "b": nn.Parameter(torch.rand(4) + 0.5)}
    net: Any = made(lambda m, x: operator(torch.sigmoid(m.up(x)), m.w, m.b), up=nn.Linear(5, 12), **weights)
    net.up.weight.detach()[::2] = 0
    return net.eval()


@pytest.mark.usefixtures("products")
def test_a_bias_is_what_is_added_to_products_of_zeros() -> None:
    assert affine(AFFINELY) == Affine("b")
    assert affine(SCALED) is None
    assert affine(torch.ops.aten.addmm.default) == Affine("self")
    assert affine(torch.ops.aten.matmul.default) == Affine(None)
    assert affine(torch.ops.aten.conv_transpose2d.input) is None


@pytest.mark.usefixtures("products")
def test_one_rule_is_all_that_is_known_of_an_operator() -> None:
    dense = model(AFFINELY)
    result = fasp_fx.prune(dense, (BATCHES[0],), calibration=BATCHES, budget=Macs(0.67), loss=None)
    (spent,) = result.report.budgets
    assert (spent.dense, spent.used) == (64 * (5 * 12 + 12 * 4), 64 * (5 * 8 + 8 * 4))
    assert dict(result.module.named_parameters())["w"].shape == (8, 4)
    (consumer,) = result.plan.groups[0].consumers
    assert set(consumer.removed) <= set(range(0, 12, 2))
    x = torch.randn(50, 5)
    assert torch.allclose(result.module(x), dense(x), atol=1e-2)


@pytest.mark.usefixtures("products")
def test_what_is_no_bias_is_not_repaired_as_one() -> None:
    dense = model(SCALED)
    assert macs_of(fasp_fx.analyze(dense, (BATCHES[0],))).whole == 64 * (5 * 12 + 12 * 4)
    # The operator has no gradient.
    with pytest.warns(fasp_fx.CalibrationWarning, match=r"cannot be run backwards.*as is done now"):
        result = fasp_fx.prune(dense, (BATCHES[0],), calibration=BATCHES, sparsity=0.3)
    assert torch.equal(dict(result.module.named_parameters())["b"], dense.b)  # type: ignore[arg-type]
