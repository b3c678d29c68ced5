"""``torch.compile(model, backend=fasp_fx.backend(plan))`` against the masked dense model."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from corpus.layers import by_head, flexible
from models import Spec, build, linear, made, parameter, randomise, tokens
from oracle import TOLERANCE, error
from torch import Tensor, fx, nn

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


def hidden(divided: bool = False) -> nn.Module:
    """Two hidden layers; ``divided`` breaks the graph between the first and the second."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.second(torch.relu(m.first(x)))
        if divided:
            torch._dynamo.graph_break()
        return m.last(torch.relu(m.third(x)))

    return made(forward, **linear(first=(6, 16), second=(16, 16), third=(16, 16), last=(16, 4)))


@pytest.fixture(scope="module")
def perceptron() -> tuple[nn.Module, Tensor, fasp_fx.PruningPlan]:
    torch.manual_seed(0)
    model, example = hidden(), torch.randn(5, 6)
    return model, example, plan_for(model, example, sparsity=0.3)


@torch.no_grad()
def masked_exact(model: nn.Module, compiled: Any, plan: fasp_fx.PruningPlan, *inputs: Tensor) -> None:
    masked = Masked(model, plan)
    for x in inputs:
        assert error(compiled(x), masked(x)) <= TOLERANCE
        assert error(masked(x), model(x)) > 100 * TOLERANCE


def test_smaller_graphs_at_several_sizes_without_a_warning(perceptron: Any) -> None:
    model, example, plan = perceptron
    spy = Spy()
    compiled = compiled_by(model, plan, spy)
    with warnings.catch_warnings(action="error", category=fasp_fx.PartialPlanWarning):
        masked_exact(model, compiled, plan, example, torch.randn(7, 6), torch.randn(9, 6))
    assert len(spy.weights) == 2, "one graph for the first size, one for all"
    assert all(size < sum(p.numel() for p in model.parameters()) for size in spy.weights)
    torch._dynamo.reset()
    masked_exact(model, compiled_by(model, plan, "inductor"), plan, example)


def tied() -> nn.Module:
    model: Any = build(SPEC)
    model.head.weight = model.embed.weight
    return model


FUSED = Spec(hidden=8, kv_heads=2, repeat=1, head_dim=6, ffn=12, bias=True, projection="interleaved")


@pytest.mark.parametrize(
    ("make", "inner"),
    [
        pytest.param(lambda: build(SPEC), "eager", marks=pytest.mark.slow),
        (lambda: build(FUSED), "aot_eager"),
        (tied, "eager"),
    ],
    ids=["rope", "interleaved", "tied weights"],
)
def test_decoders(make: Callable[[], nn.Module], inner: str) -> None:
    """With one fused projection the plan splits a weight, and the slices are those of its parts."""
    model = make()
    plan = plan_for(model, tokens(2, 4))
    masked_exact(model, compiled_by(model, plan, inner), plan, tokens(2, 4), tokens(3, 5))


def test_changed_weights_are_seen(perceptron: Any) -> None:
    model, example, plan = perceptron
    model = copy.deepcopy(model)
    compiled = compiled_by(model, plan)
    masked_exact(model, compiled, plan, example)
    model.second.weight.detach().mul_(-1)
    masked_exact(model, compiled, plan, example)
    model.third.weight = nn.Parameter(torch.randn(16, 16))
    masked_exact(model, compiled, plan, example)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients_reach_the_full_weights(perceptron: Any, inner: str) -> None:
    model, example, plan = perceptron
    model, reference = copy.deepcopy(model), copy.deepcopy(model)
    compiled_by(model, plan, inner)(example).square().sum().backward()
    masked = Masked(reference, plan).module
    masked(example).square().sum().backward()
    removed = plan.slices()
    for (name, own), expected in zip(model.named_parameters(), masked.parameters(), strict=True):
        mask = torch.ones_like(own)
        for (other, dim), gone in removed.items():
            if other == name:
                mask.index_fill_(dim, torch.tensor(sorted(index for _, index in gone)), 0)
        assert error(own.grad, expected.grad * mask) <= TOLERANCE, name


def test_graph_breaks_leave_divided_groups_whole(perceptron: Any) -> None:
    model, example, plan = perceptron
    divided = hidden(divided=True)
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


def test_writes_leave_the_graph_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    example = torch.randn(2, 3, 8, 8)
    plan = plan_for(model, example)
    model.train()
    expected = copy.deepcopy(model)(example)
    with pytest.warns(fasp_fx.PartialPlanWarning, match="writes into"):
        assert error(compiled_by(model, plan)(example), expected) <= 1e-6


def test_refusals(perceptron: Any) -> None:
    model, example, plan = perceptron
    result, other = fasp_fx.apply(model, plan, (example,)), hidden()
    for compiled, said in (
        (compiled_by(other, plan), "another model"),
        (compiled_by(result.module, result.plan), "already applied"),
    ):
        with pytest.raises(fasp_fx.PlanError, match=said):
            compiled(example)
        torch._dynamo.reset()
    masked_exact(other, compiled_by(other, plan, check=False), plan, example)
    recurrent = made(
        lambda m, x: m.out(m.cells(x)[0]), cells=nn.LSTM(8, 24, batch_first=True), out=nn.Linear(24, 5)
    )
    plan = plan_for(recurrent, torch.randn(2, 6, 8))
    with pytest.warns(fasp_fx.PartialPlanWarning, match="recurrent layer"):
        fasp_fx.backend(plan)


@torch.no_grad()
def test_a_model_inside_another(perceptron: Any) -> None:
    model, example, plan = perceptron
    outer = nn.Sequential(model, nn.Tanh())
    with pytest.raises(fasp_fx.PlanError, match="model=model"):
        compiled_by(outer, plan)(example)
    torch._dynamo.reset()
    compiled = compiled_by(outer, plan, model=model)
    assert error(compiled(example), torch.tanh(Masked(model, plan)(example))) <= TOLERANCE


def between(step: Callable[[Any, Tensor], Tensor], width: int = 12) -> nn.Module:
    """``step`` between two layers, of which the second takes ``width`` channels."""
    return made(
        lambda m, x: m.down(step(m, m.up(x))),
        up=nn.Linear(5, 12),
        down=nn.Linear(width, 3),
        weight=parameter(12, 12),
        stack=parameter(2, 12, 12),
    )


COMPOSITES: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "glu": (lambda m, x: torch.nn.functional.glu(x, -1), 6),
    "einsum": (lambda m, x: torch.einsum("btd,edf->betf", x.relu(), m.stack).mean(1), 12),
    "tensordot": (lambda m, x: torch.tensordot(x.relu(), m.weight, ([2], [0])), 12),
    "spectrum": (lambda m, x: torch.fft.fft(x.tanh(), dim=1).real, 12),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "tensordot" else n for n in COMPOSITES]
)
def test_composites_are_taken_apart_as_by_the_capture(name: str) -> None:
    model = randomise(between(*COMPOSITES[name]), std=0.5)
    x, other = (torch.randn(batch, 5, 5, generator=torch.Generator().manual_seed(batch)) for batch in (2, 3))
    plan, spy = plan_for(model, x), Spy()
    masked_exact(model, compiled_by(model, plan, spy), plan, x, other)
    read = {name.split(".")[0] for name, _ in plan.slices()} | {"up", "down"}
    assert (
        0
        < spy.weights[0] - x.numel()
        < sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in read)
    )


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
    with pytest.warns(fasp_fx.PartialPlanWarning, match="stay whole: '3"):
        masked_exact(model, compiled, rest, x)


def held(scaled: bool) -> nn.Module:
    """Floats that modules hold, or of the call."""

    def floats(m: Any, x: Tensor) -> Tensor:
        x = m.leaky(m.batch(m.first(m.layer(x))))
        return m.last(torch.relu(m.second(x)))

    def forward(m: Any, x: Tensor, scale: float = 1.0) -> Tensor:
        return floats(m, x) * scale

    return made(
        forward if scaled else floats,
        first=nn.Linear(6, 16),
        second=nn.Linear(16, 16),
        last=nn.Linear(16, 4),
        batch=nn.BatchNorm1d(16),
        layer=nn.LayerNorm(6, eps=0.3),
        leaky=nn.LeakyReLU(0.1),
    )


def test_floats_of_modules_are_constants_at_dynamic_sizes() -> None:
    model, x, other = randomise(held(scaled=False)), torch.randn(5, 6), torch.randn(9, 6)
    plan, spy = plan_for(model, x), Spy()
    compiled = torch.compile(model, backend=fasp_fx.backend(plan, inner=spy), dynamic=True)
    with torch._dynamo.config.patch(specialize_float=True):
        masked_exact(model, compiled, plan, x, other)
    assert len(spy.weights) == 1, "one graph for all sizes"
    assert spy.weights[0] - x.numel() < sum(p.numel() for p in model.parameters())


def test_a_float_of_the_call_leaves_the_graph_whole() -> None:
    model, x = randomise(held(scaled=True)), torch.randn(5, 6)
    compiled = compiled_by(model, plan_for(model, x), dynamic=True)
    with pytest.warns(fasp_fx.PartialPlanWarning, match="specialize_float"), torch.no_grad():
        assert error(compiled(x, 0.5), model(x, 0.5)) <= TOLERANCE


# --- flex attention as a kernel


QUICK: dict[str, Any] = {"score": "random", "restore": None}
ROWS = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_narrower_values_compile_and_a_backend_leaves_them_whole() -> None:
    """Inductor's kernel takes values narrower than queries, so nothing need be padded.

    Something stands between projections and attention: inductor fails where nothing does, of the dense model
    as well.
    """
    torch.manual_seed(0)
    model = flexible(by_head, turn=torch.tanh)
    result = fasp_fx.prune(model, (ROWS,), sparsity=0.2, **QUICK)
    pads = torch.ops.aten.constant_pad_nd.default
    assert not result.program.graph.find_nodes(op="call_function", target=pads)
    compiled = torch.compile(model, backend=fasp_fx.backend(result.plan, inner="aot_eager"))
    with torch.no_grad(), pytest.warns(fasp_fx.PartialPlanWarning, match="calls flex_attention"):
        assert error(compiled(ROWS), model(ROWS)) <= TOLERANCE
    compiled = torch.compile(result.module, fullgraph=True)(ROWS)
    assert error(compiled, result.module(ROWS)) <= TOLERANCE
