"""Scores and restoration on whole models, grouped queries among them, against hooks on the dense module and
numpy in float64.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from models import Spec, build, made, randomise, tokens, wide
from torch import Tensor, nn

import fasp_fx
from fasp_fx.calibration import Problem, _restoration as restoration, ridge
from fasp_fx.calibration._restoration import GRID

SPEC = Spec(
    layers=2, hidden=8, kv_heads=2, repeat=2, head_dim=4, ffn=12, bias=True, gated=True, positions="rope"
)
BATCHES = [tokens(4, 9, seed=seed) for seed in range(4)]
CONSUMERS = [f"blocks.{layer}.{part}.weight" for layer in range(2) for part in ("attention.out", "ffn.down")]


@contextmanager
def recorded(model: nn.Module, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """The inputs of the modules that own the named weights."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    modules = dict(model.named_modules())

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: seen[name].append(args[0].detach().reshape(-1, args[0].shape[-1]))

    handles = [modules[name.rpartition(".")[0]].register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(model: nn.Module, names: list[str], batches: list[Tensor]) -> dict[str, np.ndarray]:
    with torch.no_grad(), recorded(model, names) as seen:
        for batch in batches:
            model(batch)
    return {name: torch.cat(parts).double().numpy() for name, parts in seen.items()}


def removed(result: fasp_fx.Result) -> dict[str, list[int]]:
    return {part.name: list(part.removed) for group in result.plan.groups for part in group.consumers}


def solve(weight: np.ndarray, activations: np.ndarray, kept: np.ndarray, strength: float) -> np.ndarray:
    """W (G + δI)[:, M] (G[M, M] + δI)⁻¹ with δ = strength · mean(diag G), by a general solver; of infinite
    strength the kept columns.
    """
    if np.isinf(strength):
        return weight[:, kept]
    gram = activations.T @ activations
    damped = gram + strength * np.mean(np.diag(gram)) * np.eye(len(gram))
    return np.linalg.solve(damped[np.ix_(kept, kept)], damped[kept] @ weight.T).T


def error_of(weight: np.ndarray, activations: np.ndarray, kept: np.ndarray, found: np.ndarray) -> float:
    """‖XWᵀ − X_M Vᵀ‖²_F."""
    return float(np.linalg.norm(activations @ weight.T - activations[:, kept] @ found.T) ** 2)


def repaired(weight: np.ndarray, activations: np.ndarray, kept: np.ndarray, sequences: int) -> np.ndarray:
    """What the library should make of a weight: every fourth sequence judges what the others fit, all
    strengths are tried, all tokens fit the best.
    """
    held = _held(activations, sequences)
    parts = activations.reshape(-1, len(activations) // sequences, activations.shape[1])
    fitted, judged = (part.reshape(-1, activations.shape[1]) for part in (parts[~held], parts[held]))
    strength = min(
        [*GRID, np.inf], key=lambda each: error_of(weight, judged, kept, solve(weight, fitted, kept, each))
    )
    return solve(weight, activations, kept, strength)


def _held(activations: np.ndarray, sequences: int) -> np.ndarray:
    """Which sequences judge."""
    return (
        np.arange(len(activations.reshape(-1, len(activations) // sequences, activations.shape[1]))) % 4 == 3
    )


def repaired_along(
    weight: np.ndarray, activations: np.ndarray, kept: np.ndarray, sequences: int
) -> tuple[np.ndarray, np.ndarray]:
    """Likewise of a weight with a bias, and what is added to that: the weight of a column of numbers as large
    as the activations are.
    """
    held = np.repeat(_held(activations, sequences), len(activations) // sequences)
    size = np.sqrt((activations[~held] ** 2).mean())
    found = repaired(
        np.concatenate([weight, np.zeros((len(weight), 1))], 1),
        np.concatenate([activations, np.full((len(activations), 1), size)], 1),
        np.append(kept, weight.shape[1]),
        sequences,
    )
    return found[:, :-1], found[:, -1] * size


def closeness(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def weight_of(model: nn.Module, name: str) -> np.ndarray:
    return dict(model.named_parameters())[name].detach().double().numpy()


def test_propagation_sees_what_pruned_layers_make() -> None:
    model = build(SPEC)
    result = fasp_fx.prune(model, (BATCHES[0],), calibration=BATCHES, sparsity=0.3, quality="fast")
    staged = copy.deepcopy(model)
    gone = removed(result)
    for name in CONSUMERS:  # in the order in which the data reaches them
        activations = inputs_of(staged, [name], BATCHES)[name]
        kept = np.setdiff1d(np.arange(activations.shape[1]), gone[name])
        expected, raised = repaired_along(weight_of(model, name), activations, kept, sequences=16)
        assert closeness(weight_of(result.module, name), expected) <= 1e-3, name
        bias = name.replace("weight", "bias")
        assert closeness(weight_of(result.module, bias), weight_of(model, bias) + raised) <= 1e-3, bias
        for before, after in (
            (weight_of(model, bias), weight_of(model, bias) + raised),
            (weight_of(model, name)[:, kept], expected),
        ):
            assert closeness(before, after) > 1e-2, f"the restoration of {name} changes nothing to be seen"
        with torch.no_grad():
            own, made = dict(staged.named_parameters()), dict(result.module.named_parameters())
            own[name].zero_()
            own[name][:, torch.from_numpy(kept)] = made[name]
            own[bias].copy_(made[bias])


@given(
    rows=st.sampled_from([1, 5, 90]),
    columns=st.integers(2, 12),
    samples=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    rank=st.integers(1, 12),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 999),
)
def test_a_repair_never_raises_the_error_nor_that_on_tokens_held_out(
    rows: int, columns: int, samples: tuple[int, int], rank: int, scale: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    weight = random.normal(size=(rows, columns)).astype(np.float32)
    mix = random.normal(size=(min(rank, columns), columns)) * scale
    x, held = (random.normal(size=(count, min(rank, columns))) @ mix for count in samples)
    x[:, random.integers(columns)] = 0  # a channel that is never active
    kept = np.sort(random.permutation(columns)[: random.integers(1, columns)])
    outcome = ridge(
        Problem(
            torch.from_numpy(weight),
            torch.from_numpy(x.T @ x),
            torch.from_numpy(held.T @ held),
            torch.from_numpy(kept),
        )
    )
    found = outcome.weight.double().numpy()
    assert np.isfinite(found).all()
    assert not np.delete(found, kept, axis=1).any(), "a removed column holds a value"
    both = np.concatenate([x, held])
    for seen, before, after in (
        (both, outcome.error_before, outcome.error_after),
        (held, outcome.held_before, None),
    ):
        cut, left = (error_of(weight, seen, kept, other) for other in (weight[:, kept], found[:, kept]))
        total = float(np.linalg.norm(seen @ weight.T) ** 2)
        assert left <= cut * (1 + 1e-6) + 1e-12 * total
        assert before == pytest.approx(cut / total, rel=1e-3, abs=1e-9)
        assert after is None or after == pytest.approx(left / total, rel=1e-3, abs=1e-9)
    assert outcome.held_before is not None
    assert outcome.held_after is not None
    assert outcome.held_after <= outcome.held_before
    if outcome.used:
        assert outcome.strength in GRID
        assert (
            closeness(found[:, kept], solve(weight.astype(np.float64), both, kept, outcome.strength)) <= 1e-3
        )
    else:
        assert (found[:, kept] == weight[:, kept]).all()
        assert outcome.error_after == outcome.error_before


@given(
    rows=st.sampled_from([1, 5, 90]),
    columns=st.integers(8, 40),
    samples=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    few=st.sampled_from([(True, True), (True, False), (False, True)]),
    has_ones=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 999),
)
def test_a_repair_by_few_tokens_themselves_is_that_by_their_gram_matrix(
    rows: int,
    columns: int,
    samples: tuple[int, int],
    few: tuple[bool, bool],
    has_ones: bool,
    scale: float,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    weight = torch.from_numpy(random.normal(size=(rows, columns)))
    mix = random.normal(size=(4, columns)) * scale
    seen = [torch.from_numpy(random.normal(size=(count, 4)) @ mix) for count in samples]
    kept = torch.from_numpy(np.sort(random.permutation(columns)[: random.integers(2, columns)]))
    if has_ones:
        weight[:, kept[-1]] = 0
        for x in seen:
            x[:, kept[-1]] = 1
    fitted, held = (x if own else x.T @ x for x, own in zip(seen, few, strict=True))
    found = ridge(Problem(weight, fitted, held, kept, has_ones), 1e-2)
    other = ridge(Problem(weight, *(x.T @ x for x in seen), kept, has_ones), 1e-2)
    assert (found.used, found.strength) == (other.used, other.strength)
    torch.testing.assert_close(found.weight, other.weight, rtol=1e-5, atol=1e-6)
    for own in ("error_before", "error_after", "held_before", "held_after"):
        assert getattr(found, own) == pytest.approx(getattr(other, own), rel=1e-5, abs=1e-9)
    if found.used and not has_ones:
        expected = solve(weight.numpy(), np.concatenate(seen), kept.numpy(), found.strength)
        assert closeness(found.weight[:, kept].numpy(), expected) <= 1e-6


def test_held_out_error_is_that_of_a_repair_that_did_not_see_the_tokens() -> None:
    random = np.random.default_rng(0)
    mix = random.normal(size=(20, 20))
    weight, x, held = (
        random.normal(size=(300, 20)),
        random.normal(size=(60, 20)) @ mix,
        random.normal(size=(20, 20)) @ mix,
    )
    kept = np.arange(15)
    outcome = ridge(
        Problem(
            torch.from_numpy(weight),
            torch.from_numpy(x.T @ x),
            torch.from_numpy(held.T @ held),
            torch.from_numpy(kept),
        )
    )
    assert outcome.used
    expected = (
        error_of(weight, held, kept, solve(weight, x, kept, outcome.strength))
        / np.linalg.norm(held @ weight.T) ** 2
    )
    assert outcome.held_after == pytest.approx(expected, rel=0.2)  # of 64 combinations of 300 rows
    assert outcome.held_after > outcome.error_after


def test_without_tokens_held_out_nothing_is_repaired() -> None:
    weight, x = (
        torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
        torch.randn(9, 5, generator=torch.Generator().manual_seed(1)),
    )
    kept = torch.tensor([0, 2, 3])
    outcome = ridge(Problem(weight, x.T @ x, None, kept))
    assert (outcome.used, outcome.held_before) == (False, None)
    assert torch.equal(outcome.weight[:, kept], weight[:, kept])


@pytest.mark.parametrize("score", ["fasp", "magnitude"])
def test_scores_equal_a_naive_computation(score: str) -> None:
    model = build(SPEC)
    result = fasp_fx.prune(model, (BATCHES[0],), calibration=BATCHES, sparsity=0.3, score=score, restore=None)
    staged, gone = copy.deepcopy(model), removed(result)
    for name in CONSUMERS:  # in the order in which the data reaches them, behind earlier removals
        activations, weight = inputs_of(staged, [name], BATCHES), weight_of(model, name)
        staged.get_parameter(name).detach()[:, gone[name]] = 0
        columns = weight.shape[1]
        if score == "fasp":
            values = [
                sum(abs(weight[i, j]) for i in range(weight.shape[0]))
                * np.sqrt(sum(activations[name][:, j] ** 2))
                for j in range(columns)
            ]
        else:
            values = [np.sqrt(sum(weight[:, j] ** 2)) for j in range(columns)]
        if "attention" in name:
            # Query heads share their key head's value channels, and each key head loses as many.
            totals = np.array(values).reshape(SPEC.kv_heads, SPEC.repeat, SPEC.head_dim).sum(1)
            lost = len(gone[name]) // (SPEC.kv_heads * SPEC.repeat)
            expected = [
                (kv * SPEC.repeat + r) * SPEC.head_dim + int(c)
                for kv in range(SPEC.kv_heads)
                for c in np.argsort(totals[kv])[:lost]
                for r in range(SPEC.repeat)
            ]
        else:
            expected = list(np.argsort(values)[: len(gone[name])])
        assert sorted(map(int, expected)) == gone[name], name


def test_the_score_of_a_group_adds_its_consumers() -> None:
    model = randomise(
        made(
            lambda self, x: torch.cat([self.left(h := self.up(x).relu()), self.right(h)], -1),
            up=nn.Linear(6, 10),
            left=nn.Linear(10, 3),
            right=nn.Linear(10, 5),
        )
    )
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    result = fasp_fx.prune(model, (x,), calibration=[x], sparsity=0.3, restore=None)
    h = inputs_of(model, ["left.weight"], [x])["left.weight"]
    total = (
        np.abs(weight_of(model, "left.weight")).sum(0) + np.abs(weight_of(model, "right.weight")).sum(0)
    ) * np.linalg.norm(h, axis=0)
    gone = removed(result)
    assert (
        gone["left.weight"]
        == gone["right.weight"]
        == sorted(np.argsort(total)[: len(gone["left.weight"])].tolist())
    )


def test_a_weight_used_twice_is_restored_on_both_inputs() -> None:
    model = randomise(
        wide(lambda self, x: self.down(self.up(x).relu()) + self.down(self.up(-x).tanh()), hidden=10)
    )
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    result = fasp_fx.prune(model, (x,), calibration=[x], sparsity=0.4)
    h = inputs_of(model, ["down.weight"], [x])["down.weight"]  # the hook sees both uses
    assert len(h) == 120
    kept = np.setdiff1d(np.arange(10), removed(result)["down.weight"])
    assert (
        closeness(
            weight_of(result.module, "down.weight"),
            repaired(weight_of(model, "down.weight"), h, kept, sequences=120),
        )
        <= 1e-3
    )


class Residual(nn.Module):
    """Blocks on a residual path."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_a_repair_makes_up_for_what_earlier_removals_changed() -> None:
    model, part = randomise(Residual(), std=0.5), 0.7
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    captured = fasp_fx.capture(model, (x[:5],))
    options: dict[str, Any] = {
        "calibration": x.split(500),
        "held_out": (),
        "sparsity": 0.4,
        "quality": "fast",
    }
    without, found = (fasp_fx.prune(captured, drift=drift, **options) for drift in (0.0, part))
    assert without.plan.groups == found.plan.groups
    kept = [name for name in range(24) if name not in found.plan.groups[1].consumers[0].removed]
    with torch.no_grad():
        first, second = model.blocks
        smaller = [
            found.module.get_parameter(f"blocks.0.{name}")
            for name in ("0.weight", "0.bias", "2.weight", "2.bias")
        ]
        dense, pruned = (
            x + first(x),
            x + nn.functional.linear(nn.functional.gelu(nn.functional.linear(x, *smaller[:2])), *smaller[2:]),
        )
        inside = second[1](second[0](pruned))  # type: ignore[index]
        target = inside @ second[2].weight.T + part * (dense - pruned)  # type: ignore[index]
        beside = torch.cat([inside[:, kept], torch.ones(len(x), 1)], 1)
        solved = torch.linalg.lstsq(beside.double(), target.double()).solution.T
    torch.testing.assert_close(
        found.module.get_parameter("blocks.1.2.weight").double(), solved[:, :-1], rtol=0.02, atol=0.01
    )
    raised = found.module.get_parameter("blocks.1.2.bias") - second[2].bias  # type: ignore[index]
    torch.testing.assert_close(raised.double(), solved[:, -1], rtol=0.02, atol=0.01)


class Flattened(Residual):
    """What a block gives is reshaped, dropped out and of another type before it is added, as the first."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            found = nn.functional.dropout(block(x.flatten(0, 1)).double(), 0.5, self.training)
            x = found.float().reshape(x.shape) + x
        return x


def test_a_drift_is_made_up_for_wherever_channels_stay_what_they_are() -> None:
    model, generator = randomise(Flattened(), std=0.3), torch.Generator().manual_seed(1)
    data = [torch.randn(8, 16, 8, generator=generator) for _ in range(10)]
    captured = fasp_fx.capture(model, (data[0],))
    options: dict[str, Any] = {"calibration": data, "sparsity": 0.3, "quality": "fast"}
    without, found = (fasp_fx.prune(captured, drift=drift, **options) for drift in (0.0, 1.0))
    assert not any("drift" in note for note in found.report.notes)
    changed = [
        name
        for line in found.plan.groups
        for name in {consumer.name for consumer in line.consumers}
        if not torch.equal(found.module.get_parameter(name), without.module.get_parameter(name))
    ]
    assert len(changed) >= len(found.plan.groups) - 1, "all but the first, behind which nothing has gone"

    with torch.no_grad():
        errors = [
            sum(float((result.module(batch) - model(batch)).square().sum()) for batch in data)
            for result in (without, found)
        ]
    assert errors[1] < 0.98 * errors[0]


DENSE = "dense tensor of real numbers"


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda problem: None, DENSE),
        (lambda problem: problem.weight, DENSE),
        (lambda problem: problem.weight[:, problem.kept] * torch.nan, "finite"),
        (lambda problem: problem.weight[:, problem.kept].to("meta"), DENSE),
        (lambda problem: problem.weight[:, problem.kept].to_sparse(), DENSE),
        (lambda problem: problem.weight[:, problem.kept] + 0j, DENSE),
    ],
)
def test_a_restoration_that_cannot_be_is_refused(returned: Any, said: str) -> None:
    x = torch.randn(40, 8)
    with pytest.raises(fasp_fx.ArgumentError, match=said):
        fasp_fx.prune(Residual().eval(), (x[:5],), calibration=[x], sparsity=0.4, restore=returned)


@pytest.mark.parametrize(
    "options", [{"drift": 0.3}, {"quality": "fast", "include": ("exempt",), "sparsity": 0.5}]
)
def test_a_plan_is_carried_out_and_restored_as_if_it_were_chosen_here(options: dict[str, Any]) -> None:
    captured = fasp_fx.capture(build(SPEC), (BATCHES[0],))
    expected = fasp_fx.prune(captured, calibration=BATCHES, **{"sparsity": 0.3, **options})
    plan = fasp_fx.PruningPlan.from_json(expected.plan.to_json())
    how = {name: value for name, value in options.items() if name == "drift"}
    found = fasp_fx.apply(captured, plan, calibration=BATCHES, **how)
    assert found.plan.groups == expected.plan.groups
    weights = (dict(each.module.named_parameters()) for each in (found, expected))
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    own, other = ([line.error_restored for line in each.report.lines] for each in (found, expected))
    assert own == other


def test_a_plan_says_what_goes() -> None:
    x = torch.randn(40, 8)
    captured = fasp_fx.capture(Residual().eval(), (x[:5],))
    plan = fasp_fx.plan_from_sets(captured, {"blocks.1.2.weight": [0]})
    with pytest.raises(fasp_fx.ArgumentError, match="sparsity="):
        fasp_fx.apply(captured, plan, calibration=[x], sparsity=0.3)
    with pytest.raises(fasp_fx.ArgumentError, match="calibration="):
        fasp_fx.apply(captured, plan, drift=0.3)


def test_a_restoration_of_ones_own_may_write_into_what_it_is_given() -> None:
    """What it returns is what the weight becomes; what it is given is neither the model nor judged."""
    model, data = Residual().eval(), [torch.randn(64, 8) for _ in range(8)]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def halved(problem: restoration.Problem) -> Tensor:
        return problem.weight[:, problem.kept] / 2

    def written(problem: restoration.Problem) -> Tensor:
        found = halved(problem)
        problem.gram.diagonal().add_(100 * problem.gram.diagonal().mean())
        problem.weight.zero_()
        return found

    first, second = (
        fasp_fx.prune(model, (data[0],), calibration=data, sparsity=0.4, restore=restore, quality="fast")
        for restore in (halved, written)
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert first.report.lines == second.report.lines
    torch.testing.assert_close(*(list(each.module.parameters()) for each in (first, second)), rtol=0, atol=0)
