"""What the analysis gets wrong shows when the result is run beside the masked dense program, and is left
whole.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from checks import untouched
from corpus.attention import attended
from models import made, wide
from oracle import error
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx
import fasp_fx.passes._remove_channels
from fasp_fx.base import largest_passing_subset
from fasp_fx.pruning.check import _compare
from fasp_fx.testing import Masked

MAGNITUDE: dict[str, Any] = {"score": "magnitude", "restore": None}


def _lean(x: Tensor, by: float) -> Tensor:
    if x.dtype != torch.bfloat16:
        raise TypeError("there is no kernel of this precision")
    return x + by * x.roll(1, -1)


_LIBRARY = torch.library.Library("fasp_fx_exactness", "FRAGMENT")
for arguments, kernel in {
    "turn(Tensor x, Tensor by)": lambda x, by: x.roll(int(by), -1),
    "turn_others(Tensor x)": lambda x: x.roll(int(x.shape[0] != 2), -1),
    "reverse(Tensor x)": lambda x: x.flip(-1),
    "lean(Tensor x, float by)": _lean,
}.items():
    name = _LIBRARY.define(f"{arguments} -> Tensor")
    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, lambda x, *_: torch.empty_like(x), "Meta")

OPERATORS = torch.ops.fasp_fx_exactness
#: these move the last dimension round by a number known only at run time, or in all batches but those of two,
#: or turn it round
turn, turn_others, reverse = OPERATORS.turn, OPERATORS.turn_others, OPERATORS.reverse
#: operators that move channels, and rules that say of them that they are pointwise
LIES = {
    OPERATORS.turn.default: "x[...], by[] -> [...]",
    OPERATORS.turn_others.default: "x[...] -> [...]",
    OPERATORS.reverse.default: "x[...] -> [...]",
    OPERATORS.lean.default: "x[...] -> [...]",
}


@pytest.fixture(autouse=True)
def lies() -> Iterator[None]:
    """Rules that say of operators that they are pointwise."""
    for operator, rule in LIES.items():
        fasp_fx.patterns.register(operator, rule)
    yield
    for operator in LIES:
        fasp_fx.patterns.unregister(operator)


class Blocks(nn.Module):
    """Feed-forward blocks in a row; in block i ``between[i]`` stands between its two layers."""

    def __init__(self, *between: Any, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.ModuleList([nn.Linear(6, width) for _ in between])
        self.down = nn.ModuleList([nn.Linear(width, 6) for _ in between])
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for up, down, between in zip(self.up, self.down, self.between, strict=True):
            x = down(between(up(x).relu()))
        return x


def same(x: Tensor) -> Tensor:
    return x


X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
BATCHES = [torch.randn(4, 16, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def _exact(model: nn.Module, result: Any, *inputs: Tensor) -> None:
    masked = Masked(model, result.plan)
    for x in inputs:
        assert error(result.module(x), masked(x)) < 1e-5
        assert error(masked(x), model(x)) > 1e-3, "masking changes nothing that can be seen"


def _pruned(model: nn.Module, *args: Tensor, **options: Any) -> Any:
    with untouched(model):
        return fasp_fx.prune(model, args or (X,), sparsity=0.3, **{**MAGNITUDE, **options})


@pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning")
@pytest.mark.parametrize(
    "options",
    [MAGNITUDE, {"score": "fasp", "restore": "least-squares", "calibration": BATCHES}],
    ids=["cut", "restored"],
)
def test_a_good_group_survives_beside_bad_ones(options: dict[str, Any]) -> None:
    model = Blocks(reverse, same, reverse).eval()
    with pytest.warns(fasp_fx.VerificationWarning) as caught:
        result = _pruned(model, **options)
    for warning, name in zip(caught, ("down.0.weight", "down.2.weight"), strict=True):
        assert f"'{name}'" in str(warning.message)
        assert "on the example inputs an output differs" in str(warning.message)
    assert "down.1.weight" in {group.name for group in result.plan.groups}
    assert not {"down.0.weight", "down.2.weight"} & {group.name for group in result.plan.groups}
    lines = {line.name: line for line in result.report.lines}
    assert lines["down.0.weight"].reason.startswith("left whole: on the example inputs")
    assert sum("stays whole" in note for note in result.report.notes) == 2
    weights = dict(result.module.named_parameters())
    for name in ("down.0.weight", "down.2.weight"):
        rows = sorted(set(range(6)) - {index for _, index in result.plan.slices().get((name, 0), ())})
        assert torch.equal(weights[name], model.get_parameter(name)[rows]), "a group left whole was repaired"
    assert 0.05 < result.report.sparsity < 0.25
    if options is MAGNITUDE:
        _exact(model, result, X, Y)


def test_a_wrong_rule_is_seen_beside_exempt_channels() -> None:
    """These are masked at sizes that are not those of the analysis."""
    model, x = attended(lambda h: reverse(h).relu()), torch.randn(4, 5, 8)
    with pytest.warns(fasp_fx.VerificationWarning, match=r"'out\.weight' stays whole"):
        result = _pruned(model, x, include=("exempt",))
    assert any(not group.consumers for group in result.plan.groups)


def test_nothing_left() -> None:
    with pytest.raises(
        fasp_fx.VerificationError, match="cannot be removed: on the example inputs an output differs"
    ):
        _pruned(Blocks(reverse).eval())


@pytest.mark.parametrize(
    ("precision", "deviation", "equal"),
    [
        (torch.bfloat16, 0.02, True),
        (torch.bfloat16, 0.05, False),
        (torch.float32, 9e-5, True),
        (torch.float32, 2e-4, False),
    ],
)
def test_little_passes_where_there_is_no_higher_precision(
    precision: torch.dtype, deviation: float, equal: bool
) -> None:
    def look(dtype: torch.dtype | None) -> float:
        if dtype is not None:
            raise TypeError(f"Cannot convert to {dtype}")
        return deviation

    found = _compare.compare_with_escalation(look, precision)
    assert (found.equal, found.alone) == (equal, True)


def opaque(*between: Any) -> nn.Module:
    """Two parts that can be captured, in a model that cannot."""

    def forward(m: Any, x: Tensor) -> Tensor:
        for part in m.parts:
            x = part(x)
            if float(x.detach().sum()) > 1e9:
                x = -x
        return x

    return made(forward, parts=nn.ModuleList([Blocks(kind, kind) for kind in between]))


@pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning")
def test_parts_are_held() -> None:
    model = opaque(same, reverse)
    with pytest.warns(fasp_fx.VerificationWarning, match="'parts.1'|'down.[01].weight'"):
        result = fasp_fx.prune(model, (X,), sparsity=0.3, **MAGNITUDE)
    assert "parts.0.down.1.weight" in {group.name for group in result.plan.groups}
    assert not {"parts.1.down.0.weight", "parts.1.down.1.weight"} & {
        group.name for group in result.plan.groups
    }
    assert error(result.module(Y), Masked(model, result.plan)(Y)) < 1e-5


def counting() -> nn.Module:
    """Moves its channels round by the number of calls so far."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.down(turn(m.up(m.blocks(x)).relu(), m.calls))
        m.calls.add_(1)
        return x

    return wide(forward, hidden=12, blocks=Blocks(same), calls=torch.zeros((), dtype=torch.long))


def amplified(between: Any = same) -> nn.Module:
    """All that is left of its values is how they were rounded."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = (m.blocks(x) * 1e5).sin()
        return x, x.argsort(-1)

    # Wide enough for kernels to sum in another order without some of it.
    return made(forward, blocks=Blocks(same, between, width=1000))


def strange(between: Any = same) -> nn.Module:
    """Gives numbers that are not finite, integers and truth."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = m.blocks(x)
        return x.log(), x.argmax(-1), x > 0

    return made(forward, blocks=Blocks(same, between))


def unbiased(*between: Any) -> nn.Module:
    """All channels of an example of zeros are alike in it; other numbers tell them apart."""
    model = Blocks(*between)
    for layer in (*model.up, *model.down):
        nn.init.zeros_(layer.bias)
    return model


def half(dtype: torch.dtype, *between: Any) -> tuple[Callable[[], nn.Module], tuple[Tensor, ...]]:
    x = torch.randn(4, 64, 6, generator=torch.Generator().manual_seed(5))
    return lambda: Blocks(*between, width=64).to(dtype), (x.to(dtype),)


def leaning(by: float) -> Callable[[Tensor], Tensor]:
    """An operator that has no higher precision."""
    return functools.partial(OPERATORS.lean.default, by=by)


def drops(x: Tensor) -> Tensor:
    return F.dropout(x, 0.3, True)


#: models without a fault, and what they are called with
RIGHT: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "writes into its input": (lambda: made(lambda m, x: m.blocks(x.mul_(0.5)), blocks=Blocks(same)), (X,)),
    "brain floats": half(torch.bfloat16, *[same] * 6),
    "half precision": half(torch.float16, *[same] * 6),
    "an operator of one precision": half(torch.bfloat16, same, same, leaning(0.0)),
    "amplified rounding": (
        amplified,
        (torch.randn(8, 40, 6, generator=torch.Generator().manual_seed(2)),),
    ),
    "drops some of its input": (
        lambda: made(lambda m, x: m.blocks(drops(x)), blocks=Blocks(same)),
        (X,),
    ),
    "outputs of all kinds": (strange, (X,)),
    "a table of integers": (
        lambda: made(
            lambda m, x: m.last(((m.up(x) > 0.1).long() @ m.codes).to(x.dtype)),
            up=nn.Linear(6, 12),
            last=nn.Linear(5, 4),
            codes=torch.randint(-9, 9, (12, 5)),
        ),
        (X,),
    ),
    "a table that ends at a second size": (
        lambda: made(
            lambda m, x, at: m.blocks(x.index_select(0, at) + m.table(at)),
            table=nn.Embedding(5, 6),
            blocks=Blocks(same),
        ),
        (torch.randn(5, 6), torch.arange(5)),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_not_at_fault(name: str) -> None:
    """Warnings are errors here."""
    make, given = RIGHT[name]
    state, before = torch.get_rng_state(), [x.clone() for x in given]
    model = make().eval()
    torch.set_rng_state(state)
    result = _pruned(model, *given)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, kept) for x, kept in zip(given, before))
    assert result.plan.groups
    assert ["in its own precision alone" in note for note in result.report.notes] == [True] * (
        name == "an operator of one precision"
    )


#: models of which a group is wrong: what they are called with, and what is said of it
WRONG: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], str]] = {
    "at other sizes": (
        lambda: Blocks(turn_others, same),
        (X,),
        r"'down.0.weight' stays whole.* on inputs of other sizes \(x\[0\] = ",
    ),
    "in the second call": (counting, (X,), "'down.weight' stays whole"),
    "where the example is the same everywhere": (
        lambda: unbiased(same, reverse),
        (torch.zeros(2, 5, 6),),
        "'down.1.weight' stays whole",
    ),
    "in brain floats": (*half(torch.bfloat16, same, reverse, same), "'down.1.weight'"),
    "in an operator of one precision": (*half(torch.bfloat16, same, same, leaning(0.1)), "'down.2.weight'"),
    "behind amplified rounding": (lambda: amplified(reverse), (X,), "'blocks.down.1.weight'"),
    "where outputs are not finite": (lambda: strange(reverse), (X,), "where it is not finite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_stays_whole_and_the_rest_goes(name: str) -> None:
    make, given, said = WRONG[name]
    model = make().eval()
    with pytest.warns(fasp_fx.VerificationWarning, match=said):
        result = _pruned(model, *given)
    assert result.plan.groups
    if name == "in the second call":
        assert model.calls == 0
        assert result.module.calls == 0, "the result has counted the calls of its check"
        masked = Masked(model, result.plan)
        for _ in range(3):
            assert error(result.module(X), masked(X)) < 1e-5
    if name == "at other sizes":
        _exact(model, result, X, Y)


def _divided(wide: Tensor, shown: Tensor) -> Tensor:
    return wide.sum(-1, keepdim=True) / shown.sum(-1, keepdim=True).clamp(min=1)


def _summed(wide: Tensor, shown: Tensor) -> Tensor:
    return (shown[..., :1] * torch.ones(12).to(wide) + 0 * wide).sum(-1, keepdim=True)


@pytest.mark.parametrize("form", [_divided, _summed, None], ids=["a mask", "ones", "a norm divided by"])
def test_approximate_groups_go_and_their_deviation_is_noted(form: Any) -> None:
    """What no weight gives is not zero where producers are: a mask that is counted, ones that are summed up.
    A norm that is divided by is no channel.
    """

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = torch.relu(m.up(x))
        shown = (x[..., :1] > 0).to(x).expand_as(hidden)
        more = form(hidden, shown) if form else m.down(F.normalize(hidden, dim=-1))
        return m.down(hidden * shown) + more

    torch.manual_seed(0)
    model, x = wide(forward, hidden=12).double(), torch.randn(2, 6, 6, dtype=torch.float64)
    result = fasp_fx.prune(model, (x,), sparsity=0.3, score="random", restore=None, include=("approximate",))
    assert result.plan.groups
    found = error(result.module(x), Masked(model, result.plan)(x))
    if form is None:
        assert (found < 1e-12, result.report.notes) == (True, ())
    else:
        assert found > 0.01
        (note,) = [note for note in result.report.notes if "approximate groups were asked for" in note]
        assert "'down.weight" in note
        assert "of its largest value" in note


def _cut_elsewhere(cut_weights: Any) -> Any:
    """Cuts the rows of one weight at the wrong places."""

    def wrong(program: Any, analysis: Any, gone: Any) -> None:
        slot = analysis.numbering.get("up.1.weight", 0)
        shifted = gone.copy()
        shifted[slot.base : slot.base + slot.size] = gone[slot.base : slot.base + slot.size][::-1]
        cut_weights(program, analysis, shifted)

    return wrong


def test_a_pass_that_cuts_the_wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifier refuses the program: the group is found, and the others go."""
    monkeypatch.setattr(
        fasp_fx.passes._remove_channels,
        "_cut_weights",
        _cut_elsewhere(fasp_fx.passes._remove_channels._cut_weights),
    )
    model = Blocks(same, same, same).eval()
    with pytest.warns(
        fasp_fx.VerificationWarning, match="'down.1.weight' stays whole.*remove_channels"
    ) as caught:
        result = _pruned(model)
    assert len(caught) == 1
    assert {"down.0.weight", "down.2.weight"} <= {group.name for group in result.plan.groups}
    _exact(model, result, X, Y)


def test_blame_takes_few_trials() -> None:
    bad = {0, 40, 63}
    trials: list[list[int]] = []

    def fault(items: list[int]) -> str | None:
        trials.append(items)
        return "a fault" if bad & set(items) else None

    kept, left = largest_passing_subset(list(range(64)), fault)
    assert ({item for item, _ in left}, kept) == (bad, [item for item in range(64) if item not in bad])
    assert len(trials) <= 1 + 2 * 6 * len(bad)
