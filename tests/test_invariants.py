"""The invariants of the design, on decoders drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from captures import one_capture
from conftest import EXAMPLES, PROFILE
from decoders import Spec, build, specs, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import TOLERANCE, error
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

import fasp_fx
from fasp_fx.testing._calling import flat_inputs

pytestmark = pytest.mark.usefixtures("shared_captures")

#: each example here captures and exports several times, so it gets few of a property's examples
few = settings(max_examples=EXAMPLES // 3 if PROFILE == "slow" else 3)
SPEC = Spec(
    layers=2, hidden=8, kv_heads=2, repeat=2, head_dim=4, ffn=12, bias=True, gated=True, positions="rope"
)


def storages(module: nn.Module) -> set[int]:
    return {
        tensor.untyped_storage().data_ptr()
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.numel()
    }


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def prune(model: nn.Module, sparsity: float = 0.3, **options: Any) -> fasp_fx.Result:
    return fasp_fx.prune(
        model, (tokens(2, 4),), sparsity=sparsity, **{"score": "random", "restore": None, **options}
    )


# --- removing nothing


def removing_nothing_changes_nothing(model: nn.Module, most: float) -> None:
    plan = prune(model, most / 2).plan
    result = fasp_fx.apply(model, replace(plan, groups=(), splits=()), (tokens(2, 4),))
    captured = fasp_fx.capture(model, (tokens(2, 4),)).program
    unseen = tokens(3, 6)
    with torch.no_grad():
        assert torch.equal(result.module(unseen), captured.module(unseen))
        assert error(result.module(unseen), model(unseen)) <= TOLERANCE
    assert not storages(result.module) & storages(model)
    weights = dict(model.named_parameters(remove_duplicate=False))
    found = dict(result.module.named_parameters(remove_duplicate=False))
    assert weights.keys() == found.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


# --- channel sets


def channel_sets_partition_the_channels(model: nn.Module, share: float) -> None:
    analysis = fasp_fx.analyze(model, (tokens(2, 4),))
    result = prune(model, share * analysis.max_sparsity)
    seen: dict[tuple[str, int], list[int]] = {}
    weights = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for group in analysis.groups:
        assert len(np.unique(group.sets)) == group.size == len(group.sets)
        for member in {(m.name, m.dim): m for m in (*group.producers, *group.consumers)}.values():
            assert member.size == weights[member.name].shape[member.dim]
            assert len(set(member.indices)) == len(member.indices)
            assert all(0 <= index < member.size for index in member.indices)
            seen.setdefault((member.name, member.dim), []).extend(member.indices)
    for place, indices in seen.items():
        assert len(set(indices)) == len(indices), f"{place} has a channel that belongs to two groups"
    for planned in result.plan.groups:
        group = next(g for g in analysis.groups if g.name == planned.name)
        members = {(m.name, m.dim): set(m.indices) for m in (*group.producers, *group.consumers)}
        for part in (*planned.producers, *planned.consumers):
            assert set(part.removed) < members[(part.name, part.dim)]
            assert list(part.removed) == sorted(set(part.removed))
    for name, tensor in model.named_parameters():
        assert bool(torch.isfinite(tensor).all()), name


def test_a_plan_is_for_one_model() -> None:
    model = build(SPEC)
    result = prune(model)
    with pytest.raises(fasp_fx.PlanError, match="own result"):
        fasp_fx.apply(result.module, result.plan, (tokens(2, 4),))
    with pytest.raises(fasp_fx.PlanError, match="another model"):
        fasp_fx.apply(build(SPEC, seed=1), result.plan, (tokens(2, 4),))
    with pytest.raises(fasp_fx.PlanError, match="different models"):
        result.plan.after(prune(build(SPEC, seed=1)).plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: replace(part, removed=(10_000,)), "does not have"),
        (lambda part: replace(part, removed=(-1,)), "does not have"),
        (lambda part: replace(part, removed=part.removed[1:]), "cuts through a channel set"),
        (lambda part: replace(part, name="nowhere.weight"), "cuts through a channel set|does not have"),
    ],
)
def test_a_damaged_plan_is_refused(change: Any, message: str) -> None:
    model = build(SPEC)
    plan = prune(model).plan
    group = plan.groups[0]
    damaged = replace(
        plan, groups=(replace(group, consumers=(change(group.consumers[0]),)), *plan.groups[1:])
    )
    with pytest.raises(fasp_fx.PlanError, match=message):
        fasp_fx.apply(model, damaged, (tokens(2, 4),))


def test_a_plan_must_keep_blocks_even() -> None:
    model = build(SPEC)
    plan = prune(model).plan
    group = next(g for g in plan.groups if g.blocks > 1)
    head = SPEC.head_dim
    producers = tuple(replace(p, removed=tuple(i for i in p.removed if i < head)) for p in group.producers)
    consumers = tuple(
        replace(c, removed=tuple(i for i in c.removed if i < head * SPEC.repeat)) for c in group.consumers
    )
    uneven = replace(plan, groups=(replace(group, producers=producers, consumers=consumers),))
    with pytest.raises(fasp_fx.PlanError, match="same number"):
        fasp_fx.apply(model, uneven, (tokens(2, 4),))


# --- one pruning after another


def pruning_in_two_steps_is_pruning_at_once(
    model: nn.Module, most: float, shares: tuple[float, float]
) -> None:
    less, more = (prune(model, share * most, score="magnitude") for share in shares)
    if not less.plan.groups:
        return
    assert all(less.plan.slices()[place] <= more.plan.slices()[place] for place in less.plan.slices())
    second = fasp_fx.apply(less.module, more.plan.after(less.plan), (tokens(2, 4),))
    unseen = tokens(3, 6)
    assert same_weights(second.module, more.module)
    assert error(second.module(unseen), more.module(unseen)) <= TOLERANCE


def test_pruning_group_after_group() -> None:
    model, example = build(SPEC), (tokens(2, 4),)
    with one_capture():
        both = prune(model)
        first = fasp_fx.apply(model, replace(both.plan, groups=both.plan.groups[:1]), example)
        rest = replace(both.plan, groups=both.plan.groups[1:])
        second = fasp_fx.apply(first.module, rest.after(first.plan), example)
    assert same_weights(second.module, both.module)
    assert not same_weights(first.module, both.module)
    assert torch.equal(second.module(tokens(3, 6)), both.module(tokens(3, 6)))


# --- shapes


class _Shapes(fx.Interpreter):
    """Runs an exported program and holds every result against the recorded one."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.graph_module)
        self.sizes: dict[Any, int] = {}
        self.checked = 0

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.op != "output":
            self._compare(n, n.meta.get("val"), found)
        return found

    def _compare(self, node: fx.Node, recorded: Any, found: Any) -> None:
        if isinstance(recorded, (list, tuple)):
            for a, b in zip(recorded, found, strict=True):
                self._compare(node, a, b)
        elif isinstance(recorded, Tensor):
            for size, actual in zip(recorded.shape, found.shape, strict=True):
                if node.op == "placeholder" and isinstance(size, torch.SymInt):
                    self.sizes.setdefault(size.node.expr, actual)
                expected = (
                    int(size.node.expr.xreplace(self.sizes)) if isinstance(size, torch.SymInt) else size
                )
                assert expected == actual, (
                    f"{node.name}: recorded {tuple(recorded.shape)}, executed {tuple(found.shape)}"
                )
            assert recorded.dtype == found.dtype
            self.checked += 1


def recorded_shapes_are_executed_ones(model: nn.Module, sparsity: float) -> None:
    result = prune(model, sparsity)
    runner = _Shapes(result.program)
    with torch.no_grad():
        (found,) = runner.run(*flat_inputs(result.program, [tokens(3, 6)]))
        assert torch.equal(found, result.module(tokens(3, 6)))
    assert runner.checked > 20


# --- the result is a model of its own


def the_result_stands_alone(model: nn.Module, spec: Spec, sparsity: float) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = prune(model, sparsity)
    assert not storages(result.module) & storages(model)
    assert {p.untyped_storage().data_ptr() for p in result.program.parameters()} == {
        p.untyped_storage().data_ptr() for p in result.module.parameters()
    }
    data, expected = tokens(3, 6), result.module(tokens(3, 6))
    assert torch.equal(result.module.train()(data), expected)
    assert torch.equal(result.module.eval()(data), expected)
    again = torch.export.export(result.module, (data,), strict=False)
    assert error(again.module()(data), expected) <= TOLERANCE
    assert error(torch.compile(result.module, backend="eager")(data), expected) <= TOLERANCE
    _train(result.module, data)
    if spec.tied:
        names = dict(result.module.named_parameters(remove_duplicate=False))
        assert names["embed.weight"] is names["head.weight"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), (
        "the caller's model changed"
    )


def _train(module: nn.Module, data: Tensor) -> None:
    def loss() -> Tensor:
        return nn.functional.cross_entropy(module(data)[:, :-1].flatten(0, 1), data[:, 1:].flatten())

    first = loss()
    first.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in module.parameters())
    length = sum(float((p.grad**2).sum()) for p in module.parameters())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 1e-2 / (1 + length**0.5) * parameter.grad
    assert float(loss().detach()) < float(first.detach())


def test_another_dtype() -> None:
    model = build(SPEC)
    result = prune(model)
    single = result.module(tokens(3, 6))
    double = result.module.to(torch.float64)(tokens(3, 6))
    assert double.dtype == torch.float64
    assert error(double.float(), single) <= TOLERANCE
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_compiled_with_gradients() -> None:
    result = prune(build(SPEC))
    compiled = torch.compile(result.module, backend="aot_eager")
    compiled(tokens(3, 6)).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in result.module.named_parameters()}
    result.module.zero_grad()
    result.module(tokens(3, 6)).sum().backward()
    assert all(
        torch.allclose(parameter.grad, found[name], rtol=1e-3, atol=1e-4)
        for name, parameter in result.module.named_parameters()
    )


def test_frozen_parameters_stay_frozen() -> None:
    model = build(SPEC)
    model.embed.weight.requires_grad_(False)
    result = prune(model)
    assert {name for name, p in result.module.named_parameters() if not p.requires_grad} == {"embed.weight"}


# --- tied weights


class TiedTwice(nn.Module):
    """Two branches through one pair of weights, known under several names."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.up_again, self.down_again = nn.Linear(6, 10), nn.Linear(10, 6)
        self.up_again.weight, self.down_again.weight = self.up.weight, self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()) + self.down_again(self.up_again(x).tanh())


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    model = TiedTwice().eval()
    x = torch.randn(4, 6)
    result = fasp_fx.prune(model, (x,), sparsity=0.5, score="random", restore=None)
    names = dict(result.module.named_parameters(remove_duplicate=False))
    assert names["up.weight"] is names["up_again.weight"]
    assert names["down.weight"] is names["down_again.weight"]
    assert names["up.weight"].shape == (5, 6)
    assert names["up_again.bias"].shape == names["up.bias"].shape == (5,)
    assert all(
        part.name in dict(model.named_parameters())
        for group in result.plan.groups
        for part in (*group.producers, *group.consumers)
    )
    gone = next(part.removed for group in result.plan.groups for part in group.consumers)
    mask = torch.ones(10)
    mask[list(gone)] = 0
    with torch.no_grad():
        expected = model.down(model.up(x).relu() * mask) + model.down_again(model.up_again(x).tanh() * mask)
        assert error(result.module(x), expected) <= TOLERANCE
    _tied_restored(model)


def _tied_restored(model: nn.Module) -> None:
    data = torch.randn(64, 6)
    result = fasp_fx.prune(model, (data,), calibration=[data], sparsity=0.5)
    names = dict(result.module.named_parameters(remove_duplicate=False))
    assert names["down.weight"] is names["down_again.weight"]


# --- plans as data


def a_plan_survives_json_and_replays(model: nn.Module, sparsity: float) -> None:
    result = prune(model, sparsity)
    read = fasp_fx.PruningPlan.from_json(result.plan.to_json())
    assert read == result.plan
    replayed = fasp_fx.apply(model, read, (tokens(2, 4),))
    assert replayed.plan == result.plan
    assert same_weights(replayed.module, result.module)
    assert torch.equal(replayed.module(tokens(3, 6)), result.module(tokens(3, 6)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format": "something/9"}',
        '{"format": "fasp_fx.document/1", "kind": "plan", "groups": 3}',
    ],
)
def test_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(fasp_fx.PlanError):
        fasp_fx.PruningPlan.from_json(text)


# --- kinds of models, and what the analysis offers


def test_batch_of_one_stays_dynamic() -> None:
    model = build(SPEC)
    result = fasp_fx.prune(model, (tokens(1, 4),), sparsity=0.3, score="random", restore=None)
    for batch, length in ((1, 4), (1, 9), (5, 3)):
        assert result.module(tokens(batch, length)).shape[:2] == (batch, length)
    assert not result.report.notes


def test_meta_device() -> None:
    model = build(SPEC)
    with torch.device("meta"):
        hollow = type(model)(SPEC).eval()
    analysis = fasp_fx.analyze(hollow, (tokens(2, 4),))
    assert list(map(str, analysis.groups)) == list(map(str, fasp_fx.analyze(model, (tokens(2, 4),)).groups))
    with pytest.raises(fasp_fx.ArgumentError, match="meta"):
        fasp_fx.prune(hollow, (tokens(2, 4),), score="random", restore=None)


def test_all_kinds_of_models() -> None:
    model, example = build(SPEC), (tokens(2, 4),)
    dim = torch.export.Dim.AUTO
    exported = torch.export.export(model, example, dynamic_shapes=({0: dim, 1: dim},), strict=False)
    kinds: Mapping[str, Any] = {"module": model, "graph module": exported.module(), "program": exported}
    results = {
        kind: fasp_fx.prune(given, example, sparsity=0.3, score="random", restore=None)
        for kind, given in kinds.items()
    }
    expected = results["module"].module(tokens(2, 4))
    for kind, result in results.items():
        assert result.plan.slices() == results["module"].plan.slices(), kind
        assert error(result.module(tokens(2, 4)), expected) <= TOLERANCE, kind
    assert results["program"].module(tokens(3, 6)).shape[:2] == (3, 6)


def test_explain() -> None:
    analysis = fasp_fx.analyze(build(SPEC), (tokens(2, 4),))
    path = analysis.explain("blocks.0.ffn.gate.weight", "blocks.0.ffn.down.weight")
    assert path[0] == "blocks.0.ffn.gate.weight"
    assert path[-1] == "blocks.0.ffn.down.weight"
    assert any("silu" in line for line in path)
    assert sum("linear" in line for line in path) == 2
    # weights of two layers meet in the hidden dimension alone; biases do not
    assert any(
        "add" in line for line in analysis.explain("blocks.0.ffn.gate.weight", "blocks.1.ffn.down.weight")
    )
    for first, second in (
        ("blocks.0.ffn.gate.bias", "blocks.1.ffn.up.bias"),
        ("blocks.0.attention.q.bias", "blocks.0.attention.out.weight"),
    ):
        assert analysis.explain(first, second) == []
    with pytest.raises(fasp_fx.ArgumentError, match="nowhere"):
        analysis.explain("nowhere", "blocks.0.ffn.down.weight")


def test_graph_of_groups() -> None:
    analysis = fasp_fx.analyze(build(SPEC), (tokens(2, 4),))
    graph = analysis.graph()
    group = next(g for g in analysis.groups if g.name == "blocks.1.ffn.down.weight")
    vertex = ("group", group.name)
    assert graph.nodes[vertex]["status"] == "prunable"
    assert graph.nodes[vertex]["size"] == 12
    assert {name for _, name in graph.predecessors(vertex)} == {
        f"blocks.1.ffn.{part}.{kind}" for part in ("gate", "up") for kind in ("weight", "bias")
    }
    assert {name for _, name in graph.successors(vertex)} == {"blocks.1.ffn.down.weight"}
    assert sum(data["kind"] == "group" for _, data in graph.nodes(data=True)) == len(analysis.groups)


def test_explain_knows_the_names_of_fused_weights() -> None:
    spec = replace(SPEC, repeat=1, projection="stacked")
    path = fasp_fx.analyze(build(spec), (tokens(2, 4),)).explain(
        "blocks.0.attention.qkv.weight", "blocks.0.attention.out.weight"
    )
    assert path[-1] == "blocks.0.attention.out.weight"
    assert any("scaled_dot_product_attention" in line for line in path)


def test_names_are_those_of_named_parameters(zoo_model: Any, zoo_analysis: Any) -> None:
    """Also for tied weights, of which ``named_parameters`` gives the first name."""
    names = {name for name, _ in zoo_model("gpt2").named_parameters()} | {
        name for name, _ in zoo_model("gpt2").named_buffers()
    }
    assert {
        member.name
        for group in zoo_analysis("gpt2").groups
        for member in (*group.producers, *group.consumers)
    } <= names


# --- all of the above, for decoders drawn at random


@few
@given(spec=specs(), share=st.floats(0.1, 0.9), shares=st.tuples(st.floats(0.1, 0.6), st.floats(0.6, 1.0)))
def test_what_holds_for_every_decoder(spec: Spec, share: float, shares: tuple[float, float]) -> None:
    """Each decoder is captured once; a capture survives all prunings."""
    model = build(spec)
    with one_capture():
        most = fasp_fx.analyze(model, (tokens(2, 4),)).max_sparsity
        removing_nothing_changes_nothing(model, most)
        channel_sets_partition_the_channels(model, share)
        pruning_in_two_steps_is_pruning_at_once(model, most, shares)
        recorded_shapes_are_executed_ones(model, share * most)
        the_result_stands_alone(model, spec, share * most)
        a_plan_survives_json_and_replays(model, share * most)
