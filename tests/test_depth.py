"""Whole residual blocks that go: an identity stays, as exactly as where channels go."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EXAMPLES
from fasp_fx.gates import attach
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from zoo import ZOO

import fasp_fx
from fasp_fx import Result
from fasp_fx.errors import EagerError, PlanError
from fasp_fx.testing import check_program
from fasp_fx.testing._case import draw_part

pytestmark = pytest.mark.usefixtures("shared_captures")

WIDTH = 12
DEPTH: dict[str, Any] = {"include": ("depth",), "granularity": ("channel", "head")}


class Gain(nn.Module):
    """What often stands between a block and the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.1), nn.LayerNorm(WIDTH)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.drop(x)) * 0.7
        return found


class FeedForward(nn.Module):
    def __init__(self, bias: bool, gain: bool) -> None:
        super().__init__()
        self.norm, self.gain = nn.LayerNorm(WIDTH), Gain() if gain else nn.Identity()
        self.gate, self.up, self.down = (
            nn.Linear(WIDTH, 20),
            nn.Linear(WIDTH, 20),
            nn.Linear(20, WIDTH, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        found: Tensor = x + self.gain(self.down(F.silu(self.gate(y)) * self.up(y)))
        return found


class Attention(nn.Module):
    def __init__(self, bias: bool, gain: bool) -> None:
        super().__init__()
        self.norm, self.gain = nn.LayerNorm(WIDTH), Gain() if gain else nn.Identity()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y, size = self.norm(x), (*x.shape[:2], 3, 4)
        parts = (project(y).view(size).transpose(1, 2) for project in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(x.shape)
        found: Tensor = self.gain(self.out(mixed)) + x
        return found


class Residual(nn.Module):
    def __init__(self, kinds: list[tuple[type[nn.Module], bool, bool]], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(kind(bias, gain) for kind, bias, gain in kinds)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.last(x)
        return found


KINDS = st.lists(
    st.tuples(st.sampled_from([FeedForward, Attention]), st.booleans(), st.booleans()), min_size=1, max_size=4
)


def numbers(samples: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(samples, tokens, 5, generator=torch.Generator().manual_seed(seed))


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@settings(max_examples=max(EXAMPLES // 2, 4))
@given(KINDS, st.integers(0, 1 << 16), st.data())
def test_whatever_blocks_go_the_result_is_the_masked_dense_model(
    kinds: list[Any], seed: int, data: st.DataObject
) -> None:
    model = Residual(kinds, seed).eval()
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
    assert len(products) == 2 + sum(3 if kind is FeedForward else 4 for kind in kept)
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


@pytest.mark.parametrize("name", ["llama_gqa", "opt", "bert", "gpt2", "gemma2"])
def test_a_layer_of_a_transformer_goes_as_a_whole(name: str) -> None:
    entry = ZOO[name]
    model = entry.build()
    groups = fasp_fx.analyze(fasp_fx.capture(model, (), entry.example()), **DEPTH).chosen
    names = [group.name for group in groups if not group.needed]
    assert len(names) == len(groups) == 4, "two feed-forward blocks, two of attention"
    result = pruned(model, entry.example(), *names[:2], restore=None)
    assert {group.name for group in result.plan.groups} == set(names[:2])
    oracle = zeroed(model, result.plan)
    for batch, tokens in ((2, 7), (3, 11)):
        inputs = entry.example(batch, tokens)
        assert error(result.module(**inputs)[0], oracle(**inputs)[0]) < TOLERANCE
    prefix = names[0].split(".0.")[0] + ".0."
    left = {
        name: parameter for name, parameter in result.module.named_parameters() if name.startswith(prefix)
    }
    assert left
    assert all(parameter.dim() == 1 for parameter in left.values() if parameter.numel())


class Convolutions(nn.Module):
    """A residual network with batch norms, one of which stands between a block and the sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3)
        self.inner = nn.ModuleList(nn.Conv2d(8, 12, 3, padding=1, bias=bias) for bias in (True, False))
        self.outer = nn.ModuleList(nn.Conv2d(12, 8, 3, padding=1, bias=bias) for bias in (True, False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (12, 8, 12, 8))
        for norm in self.norms:
            for tensor in (norm.running_mean, norm.bias):
                assert isinstance(tensor, Tensor)
                nn.init.normal_(tensor)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for index, (inner, outer) in enumerate(zip(self.inner, self.outer, strict=True)):
            hidden = torch.relu(self.norms[2 * index](inner(x)))
            x = torch.relu(self.norms[2 * index + 1](outer(hidden)) + x)
        found: Tensor = self.last(x)
        return found


@pytest.mark.parametrize("block", [0, 1])
def test_a_block_of_a_convolutional_network(block: int) -> None:
    model, images = Convolutions().eval(), torch.randn(2, 3, 9, 9)
    result = pruned(model, {"x": images}, f"outer.{block}", restore=None)
    oracle = zeroed(model, result.plan)
    assert error(result.module(torch.cat([images] * 2)), oracle(torch.cat([images] * 2))) < TOLERANCE
    assert len(result.module.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)) == 4
    with pytest.raises(EagerError, match="no copy of Convolutions"):
        result.eager(model)


def test_the_bias_of_what_goes_makes_up_for_its_mean() -> None:
    model, x = Residual([(FeedForward, True, False), (FeedForward, True, False)], 0).eval(), numbers(64, 5)
    masked, repaired = (
        pruned(model, {"x": x}, "blocks.0", restore=restore) for restore in (None, "least-squares")
    )
    errors = [(result.module(x) - model(x)).square().mean() for result in (masked, repaired)]
    assert errors[1] < errors[0]


def test_the_allocation_takes_the_block_that_does_nothing_and_leaves_it_where_not_asked() -> None:
    model, x = Residual([(FeedForward, True, False)] * 3, 0).eval(), numbers(64, 5)
    with torch.no_grad():
        model.blocks[1].down.weight.mul_(1e-4)  # type: ignore[union-attr, operator]
    for include, least in (((), 1), (("depth",), 0)):
        result = fasp_fx.prune(model, (x,), calibration=[x], sparsity=0.4, include=include)
        kept = result.module.get_parameter("blocks.1.down.weight").shape[1]
        assert kept == least
        assert result.report.sparsity == pytest.approx(0.4, abs=0.05)


def test_results_are_saved_compiled_trained_and_exported(tmp_path: Any) -> None:
    model, x = Residual([(FeedForward, False, False), (Attention, True, True)], 0).eval(), numbers(2, 3)
    result = pruned(model, {"x": x}, "blocks.0", "blocks.1", restore=None)
    expected = result.module(x)
    assert error(fasp_fx.load(result.save(tmp_path / "out")).module(x), expected) < 1e-6
    assert error(torch.export.export(result.module, (x,)).module()(x), expected) < 1e-6
    assert error(torch.compile(result.module, backend="aot_eager")(x), expected) < 1e-6
    assert (
        error(torch.compile(model, backend=fasp_fx.backend(result.plan))(x), zeroed(model, result.plan)(x))
        < 1e-5
    )
    result.module(x).square().mean().backward()
    gradients = [p.grad for p in result.module.parameters() if p.grad is not None and p.numel()]
    assert gradients
    again = fasp_fx.capture(result.module, (x,)).program
    assert error(again.module(x), expected) < 1e-6


class Ways(nn.Module):
    """Blocks that no identity can stand for."""

    def __init__(self, form: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        self.other, self.mix = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table, self.form = nn.Parameter(torch.randn(20, 20)), form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x, torch.relu(self.up(x)))


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
    model, x = Ways(WAYS[way]).eval(), torch.randn(4, 3, WIDTH)
    captured = fasp_fx.capture(model, (x,))
    groups = fasp_fx.analyze(captured, include=("depth",)).chosen
    assert all(group.needed for group in groups)
    for group in groups:
        with pytest.raises(PlanError, match="keeps at least 1"):
            fasp_fx.plan_from_sets(captured, {group.name: range(group.size)}, include=("depth",))


def test_budgets_count_what_goes_with_a_block() -> None:
    model, x = Residual([(FeedForward, True, False)] * 3, 0).eval(), numbers(64, 5)
    budget = fasp_fx.budgets.Parameters(0.45)
    result = fasp_fx.prune(model, (x,), calibration=[x], budget=budget, include=("depth",))
    whole = parameters_of(model)
    assert parameters_of(result.module) <= 0.45 * whole
    widths = [result.module.get_parameter(f"blocks.{index}.down.weight").shape[1] for index in range(3)]
    assert result.report.budgets[0].used == parameters_of(result.module)
    assert np.sum(widths) < 30


def test_every_flow_takes_it() -> None:
    """Search and the drift run behind a block that went."""
    model, x = Residual([(FeedForward, True, False)] * 2, 0).eval(), numbers(32, 5)
    with torch.no_grad():
        model.blocks[0].down.weight.mul_(1e-4)  # type: ignore[union-attr, operator]
    ways: list[dict[str, Any]] = [{"quality": "best"}, {"allocation": "search"}]
    for options in itertools.chain(ways):
        result = fasp_fx.prune(model, (x,), calibration=[x] * 3, sparsity=0.5, include=("depth",), **options)
        assert result.module.get_parameter("blocks.0.down.weight").shape[1] == 0
        assert error(result.module(x), model(x)) < 0.05


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


def test_with_the_weights_in_files(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasp_fx.base._scratch.SMALLEST", 0)
    model, x = Residual([(FeedForward, True, False)] * 2, 0).eval(), numbers(32, 5)
    expected = pruned(model, {"x": x}, "blocks.0")
    with fasp_fx.offload(tmp_path):
        found = pruned(model, {"x": x}, "blocks.0")
        assert torch.equal(found.module(x), expected.module(x))


def test_gates_that_close_all_of_a_block() -> None:
    model, x = Residual([(FeedForward, True, False)] * 2, 0).eval(), numbers(32, 5)
    gates = attach(model, (x,), sparsity=0.6, include=("depth",))
    with torch.no_grad():
        for index, scores in enumerate(gates.scores):
            scores.copy_(torch.randn(scores.shape) + (8.0 if index else -8.0))
    plan = gates.plan()
    gates.detach()
    result = fasp_fx.apply(model, plan, (x,))
    assert error(result.module(x), zeroed(model, plan)(x)) < TOLERANCE
    assert result.module.get_parameter("blocks.0.down.weight").shape[1] == 0


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_every_invariant_holds(seed: int) -> None:
    kinds: list[Any] = [(FeedForward, True, False), (Attention, True, True), (FeedForward, False, True)]
    check_program(Residual(kinds, seed).eval(), (numbers(2, 3),), seed=seed, **DEPTH)


def test_no_step_leaves_a_single_channel_of_a_block_that_goes() -> None:
    """It lies along no dimension of channels any more, so that no second step could take it."""
    x = numbers(2, 3)
    analysis = fasp_fx.analyze(Residual([(FeedForward, True, False)], 0).eval(), (x,), **DEPTH)
    (group,) = analysis.chosen
    whole = np.zeros(int(analysis.labels.max()) + 1, dtype=bool)
    whole[group.sets] = True
    parts = [draw_part(analysis, whole, np.random.default_rng(seed)) for seed in range(100)]
    left = {group.width - int(part.sum()) for part in parts}
    assert 1 not in left
    assert {0, 2} <= left


class Served(nn.Module):
    """Two blocks that read the same, which is made with random numbers, and have biases that are computed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ups, self.downs = (
            nn.ModuleList(nn.Linear(*sizes) for _ in range(2)) for sizes in ((WIDTH, 20), (20, WIDTH))
        )
        self.last = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.tanh(x) + torch.rand_like(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + F.linear(torch.relu(up(both)), down.weight, 2 * down.bias + x.mean((0, 1)))
        found: Tensor = self.last(x + torch.rand_like(x))
        return found


@pytest.mark.parametrize("names", [("downs.0",), ("downs.1",), ("downs.0", "downs.1")])
def test_random_numbers_and_what_a_bias_is_computed_of_stay(names: tuple[str, ...]) -> None:
    model, x = Served().eval(), torch.randn(4, 3, WIDTH)
    result = pruned(model, {"x": x}, *names, restore=None)
    assert len(result.plan.groups) == len(names)
    torch.manual_seed(1)
    expected = zeroed(model, result.plan)(x)
    torch.manual_seed(1)
    assert error(result.module(x), expected) < TOLERANCE


class Again(nn.Module):
    """What the block is added to meets it once more before the sum that all ends in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        y = self.down(torch.relu(self.up(x)))
        return (x + y) * y + x


def test_a_block_that_is_read_twice_before_its_sum() -> None:
    model, x = Again().eval(), torch.randn(4, 3, WIDTH)
    result = pruned(model, {"x": x}, "down", restore=None)
    assert error(result.module(x), zeroed(model, result.plan)(x)) < TOLERANCE
    assert not result.module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)


class Unbatched(nn.Module):
    """Convolutions of one image, whose first dimension is that of the channels."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.first, self.inner, self.outer = kind(3, 8, 1), kind(8, 12, 3, padding=1), kind(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        found: Tensor = x + self.outer(torch.relu(self.inner(x)))
        return found


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_bias_of_a_convolution_without_a_batch_lies_along_its_channels(dims: int) -> None:
    model, x = Unbatched(dims).eval(), torch.randn(3, *[8] * dims)
    result = pruned(model, {"x": x}, "outer", restore=None)
    assert len(result.plan.groups) == 1
    assert error(result.module(x), zeroed(model, result.plan)(x)) < TOLERANCE


class Layouts(nn.Module):
    """A view of a sum of values of which only the block lies in memory as the view has it."""

    def __init__(self, bias: bool, expanded: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH, bias=bias)
        self.first, self.expanded = nn.Linear(WIDTH, WIDTH), expanded

    def forward(self, x: Tensor) -> Tensor:
        start = self.first(x.transpose(0, 1)).transpose(0, 1)
        if self.expanded:
            start = self.first(x)[:, :1].expand(x.shape)
        found: Tensor = (self.down(torch.relu(self.up(x))) + start).view(-1, WIDTH)
        return found


@pytest.mark.parametrize(("bias", "expanded"), itertools.product([False, True], repeat=2))
def test_what_stands_for_a_block_lies_in_memory_as_it_did(bias: bool, expanded: bool) -> None:
    model, x = Layouts(bias, expanded).eval(), torch.randn(4, 3, WIDTH)
    result = pruned(model, {"x": x}, "down", restore=None)
    for inputs in (x, torch.randn(5, 3, WIDTH)):
        assert error(result.module(inputs), zeroed(model, result.plan)(inputs)) < TOLERANCE


class Handed(nn.Module):
    """Outputs that the caller may write into."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.view(-1, WIDTH)
        x = x + self.down(torch.relu(self.up(x)))
        y = torch.tanh(x)
        return y, (y + self.down(torch.relu(self.up(y)))).view(-1)


def test_outputs_share_no_memory_with_each_other_or_an_input() -> None:
    model, x = Handed().eval(), torch.randn(4, 3, WIDTH)
    result = pruned(model, {"x": x}, "down", restore=None)
    assert error(result.module(x)[1], zeroed(model, result.plan)(x)[1]) < TOLERANCE
    first, second = result.module(x)
    kept = first.clone()
    second.zero_()
    assert torch.equal(first, kept)
