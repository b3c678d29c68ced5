"""``torch.compile(model, backend=fasp_fx.backend(plan))`` against the masked dense model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from decoders import Spec, build, tokens
from oracle import TOLERANCE, error
from torch import Tensor, fx, nn
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import randomise

import fasp_fx
from fasp_fx.testing import Masked

SPEC = Spec(hidden=8, kv_heads=2, repeat=2, head_dim=6, ffn=12, bias=True, gated=True, positions="rope")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_by(called: Any, plan: fasp_fx.PruningPlan, inner: Any = "eager", **options: Any) -> Any:
    """A model, or a function that calls it, compiled by the backend of a plan."""
    own = {name: options.pop(name) for name in ("model", "check") if name in options}
    return torch.compile(called, backend=fasp_fx.backend(plan, inner=inner, **own), **options)


def plan_for(model: nn.Module, example: Tensor, **options: Any) -> fasp_fx.PruningPlan:
    return fasp_fx.prune(
        model, (example,), score="magnitude", restore=None, **{"sparsity": 0.2, **options}
    ).plan


class Spy:
    """An inner backend that runs the graph as it is and remembers the sizes of what it was given."""

    def __init__(self) -> None:
        self.weights: list[int] = []

    def __call__(self, module: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        self.weights.append(
            sum(value.numel() for value in example if isinstance(value, Tensor) and value.is_floating_point())
        )
        return module


class Perceptron(nn.Module):
    """Two hidden layers; ``divided`` breaks the graph between the first and the second."""

    def __init__(self, divided: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (
            nn.Linear(6, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 4),
        )
        self.divided = divided

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = self.second(x)
        if self.divided:
            torch._dynamo.graph_break()
        return self.last(torch.relu(self.third(x)))


@pytest.fixture(scope="module")
def perceptron() -> tuple[nn.Module, Tensor, fasp_fx.PruningPlan]:
    torch.manual_seed(0)
    model, example = Perceptron().eval(), torch.randn(5, 6)
    return model, example, plan_for(model, example, sparsity=0.3)


def masked_exact(model: nn.Module, compiled: Any, plan: fasp_fx.PruningPlan, *inputs: Tensor) -> None:
    masked = Masked(model, plan)
    with torch.no_grad():
        for x in inputs:
            assert error(compiled(x), masked(x)) <= TOLERANCE
            assert error(masked(x), model(x)) > 100 * TOLERANCE


def test_smaller_graphs_at_several_sizes(perceptron: Any) -> None:
    model, example, plan = perceptron
    spy = Spy()
    compiled = compiled_by(model, plan, spy)
    masked_exact(model, compiled, plan, example, torch.randn(7, 6), torch.randn(9, 6))
    assert len(spy.weights) == 2, "one graph for the first size, one for all"
    assert all(size < sum(p.numel() for p in model.parameters()) for size in spy.weights)


@pytest.mark.parametrize(
    "spec",
    [SPEC, Spec(hidden=8, kv_heads=2, repeat=1, head_dim=6, ffn=12, bias=True, projection="interleaved")],
    ids=["rope", "interleaved"],
)
def test_decoders(spec: Spec) -> None:
    """With one fused projection the plan splits a weight, and the slices are those of its parts."""
    model = build(spec)
    plan = plan_for(model, tokens(2, 4))
    masked_exact(
        model, torch.compile(model, backend=fasp_fx.backend(plan, inner="aot_eager")), plan, tokens(2, 4)
    )


def test_a_transformer_with_tied_weights() -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 48,
    }
    model = randomise(LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes)))
    calls = [{"input_ids": torch.randint(0, 48, size), "use_cache": False} for size in ((2, 7), (3, 9))]
    plan = fasp_fx.prune(model, (), calls[0], score="magnitude", restore=None, sparsity=0.2).plan
    compiled, masked = compiled_by(model, plan), Masked(model, plan)
    with torch.no_grad():
        for inputs in calls:
            assert error(compiled(**inputs).logits, masked(**inputs).logits) <= TOLERANCE


def test_inductor(perceptron: Any) -> None:
    model, example, plan = perceptron
    masked_exact(model, torch.compile(model, backend=fasp_fx.backend(plan)), plan, example)


def test_changed_weights_are_seen(perceptron: Any) -> None:
    model, example, plan = perceptron
    model = copy.deepcopy(model)
    compiled = compiled_by(model, plan)
    masked_exact(model, compiled, plan, example)
    with torch.no_grad():
        model.second.weight.mul_(-1)
    masked_exact(model, compiled, plan, example)
    model.load_state_dict({name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()})
    masked_exact(model, compiled, plan, example)
    model.third.weight.data = torch.randn(16, 16)
    masked_exact(model, compiled, plan, example)
    model.third.weight = nn.Parameter(torch.randn(16, 16))
    masked_exact(model, compiled, plan, example)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients_reach_the_full_weights(perceptron: Any, inner: str) -> None:
    model, example, plan = perceptron
    model, reference = copy.deepcopy(model), copy.deepcopy(model)
    compiled = compiled_by(model, plan, inner)
    compiled(example).square().sum().backward()
    masked = Masked(reference, plan).module
    masked(example).square().sum().backward()
    removed = plan.slices()
    for (name, parameter), expected in zip(model.named_parameters(), masked.parameters(), strict=True):
        mask = torch.ones_like(parameter)
        for (other, dim), gone in removed.items():
            if other == name:
                mask.index_fill_(dim, torch.tensor(sorted(index for _, index in gone)), 0)
        assert error(parameter.grad, expected.grad * mask) <= TOLERANCE, name


def test_regions_without_gradients() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate, self.down = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                gate = torch.sigmoid(self.gate(x))
            return self.down(self.up(x) * gate)

    torch.manual_seed(0)
    model, example = Gated().eval(), torch.randn(3, 6)
    plan = plan_for(model, example)
    compiled_by(model, plan)(example).sum().backward()
    assert model.gate.weight.grad is None
    masked = Masked(model, plan).module
    masked.zero_grad()
    masked(example).sum().backward()
    assert error(model.down.bias.grad, masked.down.bias.grad) <= TOLERANCE
    assert error(model.up.bias.grad.sum(), masked.up.bias.grad.sum()) <= TOLERANCE


def test_graph_breaks_leave_divided_groups_whole(perceptron: Any) -> None:
    model, example, plan = perceptron
    divided = Perceptron(divided=True).eval()
    divided.load_state_dict(model.state_dict())
    compiled = compiled_by(divided, plan)
    with pytest.warns(fasp_fx.PartialPlanWarning, match="in another graph"), torch.no_grad():
        found = compiled(example)
    inside = tuple(
        group
        for group in plan.groups
        if {p.name.split(".")[0] for p in (*group.producers, *group.consumers)} != {"second", "third"}
    )
    assert 0 < len(inside) < len(plan.groups)
    part = fasp_fx.PruningPlan(plan.fingerprint, inside, plan.sparsity)
    assert error(found, Masked(model, part)(example)) <= TOLERANCE


def test_a_model_inside_another(perceptron: Any) -> None:
    model, example, plan = perceptron
    outer = nn.Sequential(model, nn.Tanh())
    with pytest.raises(fasp_fx.PlanError, match="model=model"):
        compiled_by(outer, plan)(example)
    torch._dynamo.reset()
    compiled = compiled_by(outer, plan, model=model)
    with torch.no_grad():
        assert error(compiled(example), torch.tanh(Masked(model, plan)(example))) <= TOLERANCE


def test_a_function_that_calls_the_model(perceptron: Any) -> None:
    model, example, plan = perceptron
    compiled = compiled_by(lambda x: model(x) * 2, plan)
    with torch.no_grad():
        assert error(compiled(example), 2 * Masked(model, plan)(example)) <= TOLERANCE


def test_writes_leave_the_graph_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    example = torch.randn(2, 3, 8, 8)
    plan = plan_for(model, example)
    compiled = compiled_by(model, plan)
    masked_exact(model, compiled, plan, example)
    other = copy.deepcopy(model).train()
    expected = copy.deepcopy(other)(example)
    with pytest.warns(fasp_fx.PartialPlanWarning, match="writes into"):
        assert error(compiled_by(other, plan)(example), expected) <= 1e-6


def test_refusals(perceptron: Any) -> None:
    model, example, plan = perceptron
    other = Perceptron().eval()
    with pytest.raises(fasp_fx.PlanError, match="another model"):
        compiled_by(other, plan)(example)
    torch._dynamo.reset()
    masked_exact(
        other, torch.compile(other, backend=fasp_fx.backend(plan, inner="eager", check=False)), plan, example
    )
    torch._dynamo.reset()
    result = fasp_fx.apply(model, plan, (example,))
    with pytest.raises(fasp_fx.PlanError, match="already applied"):
        torch.compile(result.module, backend=fasp_fx.backend(result.plan, inner="eager"))(example)
    with pytest.raises(fasp_fx.ArgumentError, match="list_backends"):
        fasp_fx.backend(plan, inner="nowhere")
    with pytest.raises(fasp_fx.ArgumentError, match="PruningPlan"):
        fasp_fx.backend("plan.json")  # type: ignore[arg-type]


def test_no_warning_for_a_whole_graph(perceptron: Any) -> None:
    model, example, plan = perceptron
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", fasp_fx.PartialPlanWarning)
        compiled_by(model, plan)(example)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.LSTM(8, 24, batch_first=True), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.cells(x)[0])


def test_recurrent_layers_that_dynamo_does_not_trace() -> None:
    torch.manual_seed(0)
    model, x = Remembering().eval(), torch.randn(2, 6, 8)
    plan = fasp_fx.prune(model, (x,), sparsity=0.4, score="random", restore=None).plan
    with pytest.warns(fasp_fx.PartialPlanWarning, match="allow_rnn"):
        fasp_fx.backend(plan)
    with torch._dynamo.config.patch(allow_rnn=True), warnings.catch_warnings():
        warnings.simplefilter("error", fasp_fx.PartialPlanWarning)
        fasp_fx.backend(plan)


class Between(nn.Module):
    """``step`` between two layers, of which the second takes ``width`` channels."""

    def __init__(self, step: Callable[[Any, Tensor], Tensor], width: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(width, 3)
        self.weight, self.stack = nn.Parameter(torch.zeros(12, 12)), nn.Parameter(torch.zeros(2, 12, 12))
        self.cell, self.layer = nn.GRUCell(12, 12), nn.LSTM(12, 6, 2, bidirectional=True, batch_first=True)
        self.gated = nn.GRU(12, 6, bidirectional=True, batch_first=True)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.step(self, self.up(x)))


def _cells(model: Any, x: Tensor) -> Tensor:
    state = x.new_zeros(x.shape[0], 12)
    for step in range(3):
        state = model.cell(x[:, step], state)
    return state


def _shuffled(model: Any, x: Tensor) -> Tensor:
    planes = x.relu().transpose(1, 2)[..., None]
    return torch.nn.functional.channel_shuffle(planes, 3)[..., 0].transpose(1, 2)


COMPOSITES: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "glu": (lambda m, x: torch.nn.functional.glu(x, -1), 6),
    "einsum": (lambda m, x: torch.einsum("btd,edf->betf", x.relu(), m.stack).mean(1), 12),
    "einsum of a matrix": (lambda m, x: torch.einsum("btd,df->btf", x.relu(), m.weight), 12),
    "tensordot": (lambda m, x: torch.tensordot(x.relu(), m.weight, ([2], [0])), 12),
    "channel shuffle": (_shuffled, 12),
    "spectrum": (lambda m, x: torch.fft.fft(x.tanh(), dim=1).real, 12),
    "cells": (_cells, 12),
    "LSTM": (lambda m, x: m.layer(x.tanh())[0], 12),
    "GRU": (lambda m, x: m.gated(x.tanh())[0], 12),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites_are_taken_apart_as_by_the_capture(name: str) -> None:
    model = randomise(Between(*COMPOSITES[name]), std=0.5)
    x, other = (torch.randn(batch, 5, 5, generator=torch.Generator().manual_seed(batch)) for batch in (2, 3))
    plan, spy = plan_for(model, x), Spy()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = compiled_by(model, plan, spy)
        masked_exact(model, compiled, plan, x, other)
    read = {name.split(".")[0] for name, _ in plan.slices()} | {"up", "down"}
    assert (
        0
        < spy.weights[0] - x.numel()
        < sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in read)
    )


def test_pixels_shuffled() -> None:
    model = randomise(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    )
    x = torch.randn(2, 3, 4, 4)
    plan = plan_for(model, x)
    masked_exact(model, compiled_by(model, plan), plan, x)


def test_what_dynamo_alone_does_not_show_stays_whole() -> None:
    """Without gradients, torch takes an encoder layer for one operator, which has no rule."""
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model = randomise(nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 16), layer))
    x = torch.randn(2, 5, 6)
    plan = plan_for(model, x)
    inside = [group for group in plan.groups if group.name.startswith("3.")]
    assert 0 < len(inside) < len(plan.groups)
    rest = fasp_fx.PruningPlan(
        plan.fingerprint, tuple(g for g in plan.groups if g not in inside), plan.sparsity
    )
    compiled = compiled_by(model, plan)
    with pytest.warns(fasp_fx.PartialPlanWarning, match="no rule for .*set_fastpath_enabled"):
        masked_exact(model, compiled, rest, x)
    torch._dynamo.reset()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        masked_exact(model, compiled_by(model, plan), plan, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def test_a_model_of_other_sizes_is_refused_as_that(perceptron: Any) -> None:
    _, example, plan = perceptron
    other = Perceptron()
    other.second, other.third = nn.Linear(16, 4), nn.Linear(4, 16)
    with pytest.raises(fasp_fx.PlanError, match="its shape is"):
        torch.compile(other.eval(), backend=fasp_fx.backend(plan, inner="eager", check=False))(example)


class Held(nn.Module):
    """Floats that modules hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.batch, self.layer, self.leaky = nn.BatchNorm1d(16), nn.LayerNorm(6, eps=0.3), nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.leaky(self.batch(self.first(self.layer(x))))
        return self.last(torch.relu(self.second(x)))


class Scaled(Held):
    """A float of the call."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


def test_floats_of_modules_are_constants_at_dynamic_sizes() -> None:
    model, x, other = randomise(Held()), torch.randn(5, 6), torch.randn(9, 6)
    plan, spy = plan_for(model, x), Spy()
    compiled = torch.compile(model, backend=fasp_fx.backend(plan, inner=spy), dynamic=True)
    masked_exact(model, compiled, plan, x, other)
    assert len(spy.weights) == 1, "one graph for all sizes"
    assert spy.weights[0] - x.numel() < sum(p.numel() for p in model.parameters())
    model.layer.eps, model.leaky.negative_slope = 0.9, 0.6
    masked_exact(model, compiled, plan, x, other)
    assert len(spy.weights) == 2, "one graph for each value"


class Patches(nn.Module):
    """Attention over as many tokens as there are patches in an image, in a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.qkv, self.out = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 48), nn.Linear(16, 8)
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.down(torch.relu(self.up(x)))


def test_a_group_that_dynamic_sizes_hide_stays_whole() -> None:
    model, images = randomise(Patches()), torch.randn(2, 3, 8, 8)
    plan = plan_for(model, images)
    (hidden,) = [group for group in plan.groups if group.name == "out.weight"]
    rest = fasp_fx.PruningPlan(
        plan.fingerprint, tuple(group for group in plan.groups if group is not hidden), plan.sparsity
    )
    compiled = compiled_by(model, plan, dynamic=True)
    with (
        torch._dynamo.config.patch(fake_tensor_cache_enabled=True),  # which compares sizes, as users have it
        pytest.warns(fasp_fx.PartialPlanWarning, match=r"stay whole: 'out.weight': layout"),
    ):
        masked_exact(model, compiled, rest, images, torch.randn(3, 3, 12, 8))


def test_a_float_of_the_call_leaves_the_graph_whole() -> None:
    model, x = randomise(Scaled()), torch.randn(5, 6)
    plan = plan_for(model, x)
    compiled = compiled_by(model, plan, dynamic=True)
    with (
        pytest.warns(fasp_fx.PartialPlanWarning, match="the float .*scale.*specialize_float"),
        torch.no_grad(),
    ):
        assert error(compiled(x, 0.5), model(x, 0.5)) <= TOLERANCE
    torch._dynamo.reset()
    masked = Masked(model, plan)
    with torch._dynamo.config.patch(specialize_float=True), torch.no_grad():
        for scale in (0.5, 2.0):
            assert error(compiled(x, scale), masked(x) * scale) <= TOLERANCE
