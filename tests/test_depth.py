"""Whole residual blocks that go: an identity stays, as exactly as where channels go."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from models import block, made, parameter, wide
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from zoo import ZOO

import fasp_fx
from fasp_fx import Result
from fasp_fx.errors import EagerError, PlanError
from fasp_fx.testing import check_program

pytestmark = pytest.mark.usefixtures("shared_captures")

WIDTH = 12
DEPTH: dict[str, Any] = {"include": ("depth",), "granularity": ("channel", "head")}


def spaced() -> nn.Module:
    """What often stands between a block and the sum."""
    norm = nn.LayerNorm(WIDTH)
    nn.init.normal_(norm.bias)
    return made(lambda m, x: m.norm(m.drop(x)) * 0.7, drop=nn.Dropout(0.1), norm=norm)


def beside(gain: bool) -> dict[str, nn.Module]:
    return {"norm": nn.LayerNorm(WIDTH), "gain": spaced() if gain else nn.Identity()}


def feed_forward(bias: bool, gain: bool) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        return x + m.gain(m.down(F.silu(m.gate(y)) * m.up(y)))

    layers = {"gate": nn.Linear(WIDTH, 20), "up": nn.Linear(WIDTH, 20)}
    return made(forward, **beside(gain), **layers, down=nn.Linear(20, WIDTH, bias=bias))


def attention(bias: bool, gain: bool) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        parts = (project(y).unflatten(-1, (3, 4)).transpose(1, 2) for project in (m.query, m.key, m.value))
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(x.shape)
        return m.gain(m.out(mixed)) + x

    layers = {name: nn.Linear(WIDTH, WIDTH) for name in ("query", "key", "value")}
    return made(forward, **beside(gain), **layers, out=nn.Linear(WIDTH, WIDTH, bias=bias))


Kind = tuple[Callable[[bool, bool], nn.Module], bool, bool]


def residual(kinds: Sequence[Kind], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    blocks = nn.Sequential(*(kind(bias, gain) for kind, bias, gain in kinds))
    first, last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)
    return made(lambda m, x: m.last(m.blocks(m.first(x))), first=first, last=last, blocks=blocks)


KINDS = st.lists(
    st.tuples(st.sampled_from([feed_forward, attention]), st.booleans(), st.booleans()),
    min_size=1,
    max_size=3,
)


def numbers(samples: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(samples, tokens, 5, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=EXAMPLES // 3)
@given(KINDS, st.integers(0, 1 << 16), st.data())
def test_whatever_blocks_go_the_result_is_the_masked_dense_model(
    kinds: list[Any], seed: int, data: st.DataObject
) -> None:
    model = residual(kinds, seed)
    captured = fasp_fx.capture(model, (numbers(2, 3),))
    groups = fasp_fx.analyze(captured, **DEPTH).chosen
    assert [group.needed for group in groups] == [0] * len(kinds)
    lost = {group.name: data.draw(st.integers(0, group.width)) for group in groups}
    lost[data.draw(st.sampled_from([*lost]))] = 1 << 10  # one of them goes as a whole
    removed = {group.name: range(min(lost[group.name], group.width)) for group in groups}
    plan = fasp_fx.plan_from_sets(captured, removed, **DEPTH)
    result = fasp_fx.apply(model, plan, (numbers(2, 3),))
    oracle = zeroed(model, result.plan)
    for x in (numbers(2, 3), numbers(4, 6)):
        assert error(result.module(x), oracle(x)) < TOLERANCE
    kept = [kind for (kind, *_), group in zip(kinds, groups) if lost[group.name] < group.width]
    products = result.module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert len(products) == 2 + sum(3 if kind is feed_forward else 4 for kind in kept)
    left = {name for name, parameter in result.module.named_parameters() if parameter.numel()}
    for group in groups:
        if lost[group.name] >= group.width:
            assert left.isdisjoint(member.name for member in (*group.producers, *group.consumers))


def everything(names: tuple[str, ...]) -> Any:
    """An allocation that takes all of the groups whose names contain one of these words."""

    def allocation(budget: Any, round_to: int) -> list[int]:
        return [group.width if any(name in group.name for name in names) else 0 for group in budget.groups]

    return allocation


def pruned(model: nn.Module, example: dict[str, Any], *names: str, **options: Any) -> Result:
    batches = [example] * 4
    return fasp_fx.prune(
        model,
        (),
        example,
        calibration=batches,
        sparsity=0.5,
        allocation=everything(names),
        **{"quality": "fast", **DEPTH, **options},
    )


def test_the_bias_of_what_goes_makes_up_for_its_mean() -> None:
    model, x = residual([(feed_forward, True, False), (feed_forward, True, False)]), numbers(64, 5)
    masked, repaired = (
        pruned(model, {"x": x}, "blocks.0", restore=restore) for restore in (None, "least-squares")
    )
    errors = [(result.module(x) - model(x)).square().mean() for result in (masked, repaired)]
    assert errors[1] < errors[0]


def test_the_allocation_takes_the_block_that_does_nothing_and_leaves_it_where_not_asked() -> None:
    model, x = residual([(feed_forward, True, False)] * 3), numbers(64, 5)
    with torch.no_grad():
        model.blocks[1].down.weight.mul_(1e-4)  # type: ignore[union-attr, operator]
    for include, least in (((), 1), (("depth",), 0)):
        result = fasp_fx.prune(model, (x,), calibration=[x], sparsity=0.4, include=include)
        kept = result.module.get_parameter("blocks.1.down.weight").shape[1]
        assert kept == least
        assert result.report.sparsity == pytest.approx(0.4, abs=0.05)


def test_results_are_saved_and_captured_again_and_a_compiler_applies_the_plan(tmp_path: Any) -> None:
    model, x = residual([(feed_forward, False, False), (attention, True, True)]), numbers(2, 3)
    result = pruned(model, {"x": x}, "blocks.0", "blocks.1", restore=None)
    expected = result.module(x)
    assert error(fasp_fx.load(result.save(tmp_path / "out")).module(x), expected) < 1e-6
    assert (
        error(
            torch.compile(model, backend=fasp_fx.backend(result.plan, inner="eager"))(x),
            zeroed(model, result.plan)(x),
        )
        < 1e-5
    )
    again = fasp_fx.capture(result.module, (x,)).program
    assert error(again.module(x), expected) < 1e-6


#: blocks that no identity can stand for
WAYS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "added to nothing": lambda m, x, hidden: m.other(m.down(hidden)),
    "read elsewhere as well": (lambda m, x, hidden: (lambda made: m.other(x + made) * made)(m.down(hidden))),
    "half of it from elsewhere": lambda m, x, hidden: (
        x + m.down(torch.cat([hidden[..., :8], m.other(x)], -1))
    ),
    "a weight between the two": lambda m, x, hidden: x + m.down(hidden * m.table.sum() * m.other(x).mean()),
    "a layer before the sum": (
        lambda m, x, hidden: torch.tanh(m.other(x) + m.mix(m.down(hidden))) @ m.table[:WIDTH]
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_where_no_identity_can_stay_something_of_the_block_does(way: str) -> None:
    square = (WIDTH, WIDTH)
    layers = {"other": nn.Linear(*square), "mix": nn.Linear(*square), "table": parameter(20, 20)}
    model = wide(lambda m, x: WAYS[way](m, x, torch.relu(m.up(x))), WIDTH, 20, **layers)
    x = torch.randn(4, 3, WIDTH)
    captured = fasp_fx.capture(model, (x,))
    groups = fasp_fx.analyze(captured, include=("depth",)).chosen
    assert all(group.needed for group in groups)
    for group in groups:
        with pytest.raises(PlanError, match="keep one"):
            fasp_fx.plan_from_sets(captured, {group.name: range(group.size)}, include=("depth",))


def test_a_model_that_generates(tmp_path: Any) -> None:
    model = ZOO["llama_gqa"].build()
    batches = [ZOO["llama_gqa"].example(2, 9)]
    result = fasp_fx.hf.prune(
        model,
        calibration=batches,
        sparsity=0.3,
        quality="fast",
        restore=None,
        allocation=everything(("layers.1.mlp",)),
        **DEPTH,
    )
    (group,) = result.plan.groups
    assert group.removed_sets == 128
    oracle, ids = zeroed(model, result.plan), batches[0]["input_ids"]
    result.model.save_pretrained(tmp_path / "out")
    for pruned_model in (result.model, AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert error(pruned_model(input_ids=ids).logits, oracle(input_ids=ids).logits) < TOLERANCE
        made, expected = (m.generate(ids, max_new_tokens=8, do_sample=False) for m in (pruned_model, oracle))
        assert torch.equal(made, expected)


def test_attention_that_fills_a_cache_keeps_a_head() -> None:
    entry = ZOO["llama_gqa"]
    with pytest.raises(fasp_fx.FaspError, match="from 0 to 1"):
        fasp_fx.hf.prune(
            entry.build(),
            calibration=[entry.example(2, 9)],
            sparsity=0.3,
            quality="fast",
            allocation=everything(("layers.1.self_attn",)),
            **DEPTH,
        )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_every_invariant_holds(seed: int) -> None:
    kinds: list[Any] = [(feed_forward, True, False), (attention, True, True)][seed:]
    check_program(residual(kinds, seed), (numbers(2, 3),), seed=seed, **DEPTH)


def convolutions() -> nn.Module:
    """A residual network with batch norms, one of which stands between a block and the sum."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        for index, (inner, outer) in enumerate(zip(m.inner, m.outer, strict=True)):
            hidden = torch.relu(m.norms[2 * index](inner(x)))
            x = torch.relu(m.norms[2 * index + 1](outer(hidden)) + x)
        return m.last(x)

    norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (12, 8, 12, 8))
    for norm in norms:
        nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
        nn.init.normal_(norm.bias)
    inner, outer = (
        nn.ModuleList(nn.Conv2d(*size, 3, padding=1, bias=bias) for bias in (True, False))
        for size in ((8, 12), (12, 8))
    )
    first, last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
    return made(forward, first=first, inner=inner, outer=outer, norms=norms, last=last)


def served() -> nn.Module:
    """Two blocks that read the same, which is made with random numbers, and have biases that are computed."""

    def forward(m: Any, x: Tensor) -> Tensor:
        both = torch.tanh(x) + torch.rand_like(x)
        for up, down in zip(m.ups, m.downs, strict=True):
            x = x + F.linear(torch.relu(up(both)), down.weight, 2 * down.bias + x.mean((0, 1)))
        return m.last(x + torch.rand_like(x))

    ups, downs = (nn.ModuleList(nn.Linear(*sizes) for _ in range(2)) for sizes in ((WIDTH, 20), (20, WIDTH)))
    return made(forward, ups=ups, downs=downs, last=nn.Linear(WIDTH, 4))


def again() -> nn.Module:
    """What the block is added to meets it once more before the sum that all ends in."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        y = block(m, x)
        return (x + y) * y + x

    return wide(forward, WIDTH, 20, down=nn.Linear(20, WIDTH, bias=False))


def unbatched(dims: int) -> nn.Module:
    """Convolutions of one image, whose first dimension is that of the channels."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return x + m.outer(torch.relu(m.inner(x)))

    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return made(forward, first=kind(3, 8, 1), inner=kind(8, 12, 3, padding=1), outer=kind(12, 8, 1))


def laid(bias: bool, expanded: bool) -> nn.Module:
    """A view of a sum of values of which only the block lies in memory as the view has it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        start = m.first(x.transpose(0, 1)).transpose(0, 1)
        if expanded:
            start = m.first(x)[:, :1].expand(x.shape)
        return (block(m, x) + start).view(-1, WIDTH)

    return wide(forward, WIDTH, 20, down=nn.Linear(20, WIDTH, bias=bias), first=nn.Linear(WIDTH, WIDTH))


def handed() -> nn.Module:
    """Outputs that the caller may write into."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.view(-1, WIDTH)
        x = x + block(m, x)
        y = torch.tanh(x)
        return y, (y + block(m, y)).view(-1)

    return wide(forward, WIDTH, 20, down=nn.Linear(20, WIDTH, bias=False))


ROWS, IMAGES = torch.randn(4, 3, WIDTH), torch.randn(2, 3, 9, 9)
#: models, what they are called with, and the blocks that go
GONE: dict[str, tuple[Callable[[], nn.Module], Tensor, tuple[str, ...]]] = {
    **{f"convolutions, {at}": (convolutions, IMAGES, (f"outer.{at}",)) for at in (0, 1)},
    **{
        f"random numbers, {names}": (served, ROWS, names)
        for names in (("downs.0",), ("downs.1",), ("downs.0", "downs.1"))
    },
    "read twice before its sum": (again, ROWS, ("down",)),
    **{
        f"no batch, {dims}d": (lambda dims=dims: unbatched(dims), torch.randn(3, *[8] * dims), ("outer",))
        for dims in (1, 2, 3)
    },
    **{
        f"laid out, {held}": (lambda held=held: laid(*held), ROWS, ("down",))
        for held in itertools.product([False, True], repeat=2)
    },
    "handed out": (handed, ROWS, ("down",)),
}


@pytest.mark.parametrize("name", GONE)
def test_what_stands_for_a_block_computes_as_it_did(name: str) -> None:
    torch.manual_seed(0)
    make, x, names = GONE[name]
    model = make()
    result = pruned(model, {"x": x}, *names, restore=None)
    assert len(result.plan.groups) == len(names)
    oracle = zeroed(model, result.plan)
    for inputs in (x,) if name.startswith("no batch") else (x, torch.cat([x, x])):
        torch.manual_seed(1)
        expected = oracle(inputs)
        torch.manual_seed(1)
        found = result.module(inputs)
        assert error(found, expected) < TOLERANCE
    if name == "convolutions, 0":
        with pytest.raises(EagerError, match="no copy of <made>"):
            result.eager(model)
    if name == "handed out":  # they share no memory
        kept = found[0].clone()
        found[1].zero_()
        assert torch.equal(found[0], kept)
