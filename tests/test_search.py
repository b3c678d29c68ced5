"""The search for what each group loses: its moves, its choice, the loss that it runs the pruned model for,
and the whole.
"""

import copy
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import alike, decide
from corpus.forking import Forks, X
from hypothesis import given, strategies as st
from models import ZOO, linear, made
from test_costs import problems
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

import fasp_fx
import fasp_fx.hf
from fasp_fx.allocation import Budget, Global, Macs, Parameters, Search, Trial
from fasp_fx.allocation._allocation import _counts, _neighbours
from fasp_fx.calibration import Batches, BudgetTrial, Consumers, Decision, ModelTrial, Ranks
from fasp_fx.calibration._obs import DAMPING
from fasp_fx.calibration._trial import NextTokens
from fasp_fx.errors import ArgumentError
from fasp_fx.pruning import Method
from fasp_fx.pruning._method import Measurement
from fasp_fx.pruning._prune import PROGRESS_SHARE_MEASURING

TOKENS, WIDTH = 20, 8


# Moves and choice, without a model.


@given(problems(), st.integers(0, 1000), st.floats(0.001, 1))
def test_moves_keep_the_bounds_and_the_multiples(
    problem: tuple[Budget, int, fasp_fx.Costs], seed: int, reach: float
) -> None:
    budget, round_to, costs = problem
    lost, draw = Global()(budget, round_to, costs), np.random.default_rng(seed)
    counts = [_counts(group, round_to) for group in budget.groups]
    for found in itertools.islice(_neighbours(budget, counts, lost, reach, draw), 20):
        for group, before, after in zip(budget.groups, lost, found, strict=True):
            assert 0 <= after <= group.deepest_loss
            assert after == before or not after or (group.width - after) % round_to == 0


class Made(Trial):
    """A trial of a made-up loss."""

    def __init__(self, loss: Callable[[Sequence[int], int], float], count: int) -> None:
        self.loss, self.count = loss, count

    def losses(self, lost: Sequence[int], sequences: Sequence[int]) -> list[float]:
        return [self.loss(lost, sequence) for sequence in sequences]

    def note(self, before: float, after: float, tried: int) -> None:
        self.told = (before, after)


def _noise(lost: Sequence[int], sequence: int) -> float:
    value = float(np.random.default_rng((*lost, sequence)).random())
    return math.inf if value > 0.95 else value


@given(problems(), st.integers(1, 9), st.integers(1, 6))
def test_it_never_ends_worse_than_it_began(
    problem: tuple[Budget, int, fasp_fx.Costs], count: int, offspring: int
) -> None:
    budget, start, trial = problem[0], Global()(*problem), Made(_noise, count)
    search = Search(4, offspring, seed=3)
    found = search(*problem, trial)

    def whole(lost: Sequence[int]) -> float:
        return math.fsum(_noise(lost, sequence) for sequence in range(count)) / count

    assert trial.told == (whole(start), whole(found))
    assert whole(found) <= whole(start)
    over = budget.over(found)
    assert over <= 0 if budget.is_ceiling else abs(over) <= max(abs(budget.over(start)), 1e-3)
    assert search(*problem, Made(_noise, count)) == found


# What a candidate is judged by.


def _talk(self: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    x = self.embedding(input_ids)
    for layer in self.layers:
        x = x + layer["down"](F.silu(layer["gate"](x)) * layer["up"](x))
    return self.head(x)


@cache
def talker() -> nn.Module:
    """A tiny language model: two gated layers in a residual stream, of which one is narrow."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS)
    layers = [
        nn.ModuleDict(linear(up=(WIDTH, width), gate=(WIDTH, width), down=(width, WIDTH)))
        for width in (12, 6, 12)
    ]
    layers[1]["down"].weight.detach().mul_(0.2)  # type: ignore[operator, union-attr]
    head.weight.detach().mul_(3)
    return made(_talk, embedding=embedding, layers=nn.ModuleList(layers), head=head)


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = [
        {
            "input_ids": torch.randint(TOKENS, (2, 9), generator=generator),
            "attention_mask": torch.ones(2, 9, dtype=torch.long),
        }
        for _ in range(count)
    ]
    found[0]["attention_mask"][1, 6:] = 0
    return found


@cache
def captured() -> fasp_fx.Captured:
    return fasp_fx.capture(talker(), (), batches()[0])


def trial_of(loss: Any, restore: Any, **options: Any) -> tuple[ModelTrial, list[fasp_fx.Group]]:
    """A trial over all calibration data, and the groups."""
    config = fasp_fx.PruningConfig(
        allocation=Search(sequences=100),
        loss=loss,
        restore=restore,
        score="obs",
        **options,
    )
    program = captured().program
    analysis = fasp_fx.analyze(captured())
    inputs = [program.flat_inputs((), batch) for batch in batches()]
    consumers = Consumers(analysis, restore is not None)
    measurement = Measurement(
        {"": consumers}, lambda path: Batches(inputs), Ranks(), wants_curves=True, part=1
    )
    return measurement.run(Method.of(config), lambda fraction: None).trials[""], analysis.chosen


def pruned_by_hand(
    trial: ModelTrial, groups: list[fasp_fx.Group], lost: Sequence[int], restore: Any
) -> nn.Module:
    """The module with the columns zero that go, and the others solved for by least squares over their inputs
    and as many more rows as it takes for a ridge.
    """
    found = copy.deepcopy(talker())
    for group, count in zip(groups, lost, strict=True):
        for member in group.consumers if count else ():
            sets = trial._orders[group.name][0, :count]
            gone = [index for index, own in zip(member.indices, member.sets, strict=True) if own in sets]
            with torch.no_grad():
                weight = found.get_parameter(member.name)
                kept = [column for column in range(weight.shape[1]) if column not in gone]
                if restore is not None:
                    weight[:, kept] += _repair(member.name, weight, kept, gone)
                weight[:, gone] = 0
    return found


def _repair(name: str, weight: Tensor, kept: list[int], gone: list[int]) -> Tensor:
    """What is added to the columns that stay."""
    seen: list[Tensor] = []
    layer = talker().get_submodule(name.removesuffix(".weight"))
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for batch in batches():
        talker()(**batch)
    hook.remove()
    pairs = zip(seen, batches(), strict=True)
    tokens = torch.cat([own[batch["attention_mask"] != 0] for own, batch in pairs]).double()
    ridge = math.sqrt(DAMPING * float(tokens.square().sum(0).mean())) * torch.eye(len(kept)).double()
    wanted = tokens[:, gone] @ weight[:, gone].double().T
    nothing = torch.zeros(len(kept), len(weight)).double()
    system, target = torch.cat([tokens[:, kept], ridge]), torch.cat([wanted, nothing])
    return torch.linalg.lstsq(system, target).solution.T


def sequences() -> list[dict[str, Tensor]]:
    return [
        {name: value[row : row + 1] for name, value in batch.items()}
        for batch in batches()
        for row in range(2)
    ]


def divergence(dense: Tensor, pruned: Tensor, likeliest: int) -> Tensor:
    """KL of one sequence ``[tokens, vocabulary]``, where all but the dense model's likeliest are put
    together.
    """
    top = dense.topk(min(likeliest, TOKENS)).indices
    own, other = (logits.softmax(1) for logits in (dense, pruned))
    kept = [own.gather(1, top), other.gather(1, top)]
    whole = [torch.cat([part, 1 - part.sum(1, keepdim=True)], 1).clamp(min=1e-12) for part in kept]
    return kl_divergence(*(Categorical(probs=part) for part in whole)).mean()


#: of the residual stream, and of the three layers
LOST = [(0, 0, 0, 0), (0, 5, 0, 0), (0, 3, 4, 7), (2, 3, 4, 7), (7, 11, 5, 11), (2, 3, 4, 6)]


@pytest.mark.parametrize(("restore", "likeliest"), [(None, 64), ("least-squares", 3)])
def test_divergence_is_that_of_the_module_pruned_by_hand(restore: Any, likeliest: int) -> None:
    trial, groups = trial_of("next-token", restore)
    assert isinstance(trial.fitness, NextTokens)
    trial.fitness.likeliest = likeliest
    for lost in LOST:
        other = pruned_by_hand(trial, groups, lost, restore)
        expected = []
        for batch in sequences():
            counts = batch["attention_mask"] != 0
            with torch.no_grad():
                expected.append(
                    float(
                        divergence(
                            talker()(**batch)[counts].double(), other(**batch)[counts].double(), likeliest
                        )
                    )
                )
        found = trial.losses(lost, range(8))
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert (max(found) < 1e-6) == (not any(lost))
        assert trial.losses(lost, [5, 2]) == [found[5], found[2]]


@pytest.mark.parametrize("loss", ["outputs", None])
def test_error_is_that_of_the_module_pruned_by_hand(loss: Any) -> None:
    trial, groups = trial_of(loss, "least-squares")
    models = talker(), pruned_by_hand(trial, groups, LOST[2], "least-squares")
    with torch.no_grad():
        dense, pruned = (
            [model(**batch)[batch["attention_mask"] != 0] for batch in sequences()] for model in models
        )
    pairs = zip(pruned, dense, strict=True)
    expected = [float(F.mse_loss(one, two) / two.square().mean() / 2) for one, two in pairs]
    assert trial.losses(LOST[2], range(8)) == pytest.approx(expected, rel=1e-3)


def test_a_loss_of_ones_own_sees_whole_batches() -> None:
    def loss(outputs: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        assert len(outputs) == 2
        return (outputs - inputs["input_ids"][..., None]).square().mean(2)

    trial, groups = trial_of(loss, None)
    assert trial.count == 4
    other = pruned_by_hand(trial, groups, LOST[1], None)
    with torch.no_grad():
        expected = [float(loss(other(**batch), batch).mean()) for batch in batches()]
    assert trial.losses(LOST[1], range(4)) == pytest.approx(expected, rel=1e-5)


def test_what_is_not_finite_is_infinitely_bad_and_repairs_are_kept_within_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trial, _ = trial_of("next-token", None)
    for first, last in itertools.product(range(1, 8), range(1, 8)):
        trial.losses([0, first, 1, last], [0])
        assert len(trial._repairs) <= 2 * len(trial._by_weight)
    monkeypatch.setattr(trial.fitness, "loss", lambda *given: math.nan)
    assert trial.losses([1, 1, 1, 1], [0, 1]) == [math.inf, math.inf]


@pytest.mark.parametrize("left", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("padded", [0, 7, 100, 290])
def test_the_divergence_of_long_sequences_leaves_out_padding(left: bool, padded: int) -> None:
    generator = torch.Generator().manual_seed(0)
    dense, other = (torch.randn(2, 300, TOKENS, generator=generator) for _ in range(2))
    ids, filling = torch.randint(TOKENS, (2, 300), generator=generator), torch.zeros(2, 300, dtype=torch.bool)
    filling[1, slice(padded) if left else slice(300 - padded, 300)] = True
    given = {"input_ids": ids, "attention_mask": (~filling).long()}
    fitness = NextTokens()
    fitness.likeliest = TOKENS
    kept = fitness.remember(dense, given, lambda leaf: filling)
    counts = ~filling
    expected = F.kl_div(
        other[counts].log_softmax(-1), dense[counts].log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert fitness.loss(kept, other, given, lambda leaf: filling) == pytest.approx(float(expected), rel=1e-4)


# The whole.

SEARCH = Search(generations=4, offspring=6, sequences=4)
HOW: dict[str, Any] = {
    "sparsity": 0.3,
    "loss": "next-token",
    "allocation": SEARCH,
}


def chosen(
    checkpoint: Path | None = None,
    progress: Any = None,
    costs: Any = None,
    count: int = 4,
    calibration: Any = None,
    **options: Any,
) -> Decision:
    """What goes, without taking it out, which takes longest."""
    config = fasp_fx.PruningConfig(**{**HOW, **options})
    data = batches(count) if calibration is None else calibration
    how: dict[str, Any] = {"progress": progress, "costs": costs, "checkpoint": checkpoint}
    return decide(captured().program, config, data, **how)[1]


def removed(decision: Decision) -> dict[str, int]:
    analysis = fasp_fx.analyze(captured())
    return {
        group.name: int(np.unique(analysis.labels[decision.gone & np.isin(analysis.labels, group.sets)]).size)
        for group in analysis.chosen
    }


def noted(notes: Sequence[str]) -> tuple[float, float, int]:
    (said,) = [note for note in notes if note.startswith("search: ")]
    found = re.search(r"sequences? went from (\S+) to (\S+); (\d+) candidates", said)
    assert found is not None
    return float(found[1]), float(found[2]), int(found[3])


def test_a_model_is_searched_and_the_same_is_found_again() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    fractions: list[float] = []
    result = fasp_fx.prune(captured(), calibration=batches(), progress=fractions.append, **HOW)
    drawn = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    assert drawn == (torch.rand(1).item(), np.random.rand()), "the caller's random numbers go on"
    searched = [fraction for fraction in fractions if fraction > PROGRESS_SHARE_MEASURING]
    assert (searched, searched[-1]) == (sorted(searched), 1)
    assert abs(result.report.sparsity - 0.3) <= 0.02
    first, last, tried = noted(result.report.notes)
    assert last < first
    assert 0 < tried <= 24
    decision = chosen()
    assert alike(chosen(), decision)
    assert noted(decision.notes) == noted(result.report.notes)
    other = chosen(allocation=Search(generations=4, offspring=6, sequences=4, seed=1))
    assert other.notes != decision.notes


def test_it_has_a_name_and_keeps_to_other_options() -> None:
    assert noted(chosen(count=2, sparsity=0.2, allocation="search", quality="fast").notes)[2] > 12
    capped = removed(chosen(sparsity=None, budget=(Parameters(0.8), Macs(0.8)), exclude=("layers.1.*",)))
    assert not capped["layers.1.down.weight"]
    analysis = fasp_fx.analyze(captured())
    for cap in (Parameters(0.8), Macs(0.8)):
        counted = cap.resource(analysis)
        assert counted.used([capped[group.name] for group in analysis.chosen]) <= 0.8 * counted.whole
    assert all(count % 2 == 0 for count in removed(chosen(round_to=2)).values())


# Bad input.


@pytest.mark.parametrize("value", [-1, 1.5, True, "8", None])
def test_a_search_that_cannot_be_is_refused(value: Any) -> None:
    for option in ("generations", "offspring", "sequences", "seed"):
        with pytest.raises(ArgumentError, match=rf"{option}=.* is not an integer from [01] on"):
            Search(**{option: value})


def test_parts_are_searched_together() -> None:
    result = fasp_fx.prune(Forks().eval(), (X,), calibration=[X], sparsity=0.3, allocation=SEARCH)
    first, last, tried = noted(result.report.notes)
    assert len(result.parts) > 1
    assert tried
    assert last <= first
    assert abs(result.report.sparsity - 0.3) < 0.05


def test_models_that_cannot_be_searched_are_refused(llama: Any) -> None:
    with pytest.raises(ArgumentError, match=r"allocation by trial cannot be had in the format 'plain'"):
        fasp_fx.hf.prune(ZOO["llama_gqa"].build(), format="plain", calibration=iter(()), allocation="search")
    with pytest.raises(ArgumentError, match=r"cannot try .* which no weight reads; exclude it"):
        fasp_fx.prune(llama, calibration=iter(()), allocation="search", include=("exempt",))


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ([0, 99, 0, 0], "takes 99 channel sets"),
        ([0, -1, 0, 0], "takes -1 channel sets"),
        ([1], "1 numbers for 4 groups"),
    ],
)
def test_what_a_trial_cannot_try_is_refused(lost: list[int], says: str) -> None:
    candidates, groups = trial_of("next-token", None)
    with pytest.raises(ArgumentError, match=says):
        BudgetTrial(candidates, Budget(groups, []), print).losses(lost, [0])
