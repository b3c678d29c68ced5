"""Budgets: what is predicted of a resource is what the result has of it, and as much stays as may."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import PROFILE
from corpus.forking import Forks, X
from hypothesis import assume, given, settings, strategies as st
from models import block, made, parameter, randomise, wide
from test_costs import problems
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils.flop_counter import FlopCounterMode

import fasp_fx
from fasp_fx.allocation import (
    KINDS,
    Budget,
    Bytes,
    CacheBytes,
    Cap,
    Global,
    Latency,
    Macs,
    Parameters,
    macs_of,
    uniform,
)
from fasp_fx.analysis import Resource, parameters_of
from fasp_fx.calibration import Decision
from fasp_fx.cli._app import read_amount
from fasp_fx.hf._stages import stages_of
from fasp_fx.passes import remove
from fasp_fx.pruning import make_plan
from fasp_fx.testing import build, example, programs
from fasp_fx.testing._case import draw_sets
from fasp_fx.testing.specs import Net

FAST: dict[str, Any] = {"score": "magnitude", "restore": None}


def operations(call: Callable[[], object]) -> int:
    """Multiply-accumulates of a call as torch counts them, with what it leaves out."""

    def experts(tokens: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(tokens) * weight[2]

    left_out: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda q, k, v, *_, **__: 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
        ),
        torch.ops.aten.mv: lambda matrix, *_, **__: 2 * math.prod(matrix),
        torch.ops.aten.dot: lambda vector, *_, **__: 2 * math.prod(vector),
        torch.ops.aten._trilinear: lambda first, weight, *_, **__: 2 * first[0] * math.prod(weight),
        torch.ops.aten._grouped_mm: experts,
    }
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        left_out[torch.ops.transformers.grouped_mm_fallback] = experts
    counter = FlopCounterMode(display=False, custom_mapping=left_out)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), counter:
        call()
    return counter.get_total_flops() // 2


def llama(kind: Any = hf.LlamaForCausalLM, **changed: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 120,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    return kind(kind.config_class(**sizes, **changed)).eval()


def tokens(batch: int, length: int) -> dict[str, Any]:
    return {
        "input_ids": torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(batch)),
        "use_cache": False,
    }


def steps() -> nn.Module:
    """Recurrent layers, both ways and of two kinds."""
    first = nn.LSTM(6, 20, 2, bidirectional=True, batch_first=True)
    second = nn.GRU(40, 24, batch_first=True)
    return made(
        lambda m, x: m.head(m.second(m.first(x)[0])[0]), first=first, second=second, head=nn.Linear(24, 3)
    )


def broad() -> nn.Module:
    """Layers wide enough for budgets to be met closely; the last shares its weight with the first."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.table(x)
        for each in m.blocks:
            h = h + each(h)
        return m.head(h)

    table, head = nn.Embedding(50, 24), nn.Linear(24, 50, bias=False)
    head.weight = table.weight
    blocks = [nn.Sequential(nn.Linear(24, 150), nn.GELU(), nn.Linear(150, 24)) for _ in range(3)]
    return made(forward, table=table, blocks=nn.ModuleList(blocks), head=head)


IDS = ((), tokens(2, 7))
#: models, and what they are called with
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "steps": (steps, ((torch.randn(2, 5, 6),), {})),
    "wide": (broad, ((torch.randint(0, 50, (2, 7)),), {})),
    "experts": (lambda: llama(hf.MixtralForCausalLM, num_local_experts=4), IDS),
    "llama": (llama, IDS),
}


@cache
def captured(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any], fasp_fx.Captured]:
    """A model, what it is called with, and its capture."""
    torch.manual_seed(0)
    make, (args, kwargs) = MODELS[name]
    model = make()
    return model, args, kwargs, fasp_fx.capture(model, args, kwargs)


def real(result: fasp_fx.Result, args: Any, kwargs: Any) -> dict[str, int]:
    """What a result has of each resource."""
    weights = list(result.module.parameters())
    return {
        "parameters": sum(weight.numel() for weight in weights),
        "bytes": sum(weight.numel() * weight.element_size() for weight in weights),
        "macs": operations(lambda: result.module(*args, **kwargs)),
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("steps", {}),
        ("wide", {"include": ("approximate",)}),
        ("llama", {"include": ("approximate", "exempt")}),
        ("llama", {"granularity": ("channel", "head")}),
        ("experts", {"granularity": ("channel", "expert")}),
    ],
)
def test_what_is_predicted_is_what_the_result_has(name: str, options: dict[str, Any]) -> None:
    model, args, kwargs, once = captured(name)
    budget = (Parameters(0.8), Macs(0.8), Bytes(0.8))
    result = fasp_fx.prune(once, budget=budget, **FAST, **options)
    found, report = real(result, args, kwargs), result.report
    assert {spent.resource: spent.used for spent in report.budgets} == found
    assert {spent.resource: spent.allowed for spent in report.budgets} == {
        spent.resource: 0.8 * spent.dense for spent in report.budgets
    }
    assert all(spent.used <= spent.allowed for spent in report.budgets)
    assert [spent.dense for spent in report.budgets] == [
        report.parameters[0],
        operations(lambda: model(*args, **kwargs)),
        report.bytes[0],
    ]
    assert (found["parameters"], found["bytes"]) == (report.parameters[1], report.bytes[1])
    assert result.config is not None
    assert result.config.budget == budget
    assert report.requested is None


@given(programs(), st.integers(0, 999))
@settings(max_examples=12 if PROFILE == "slow" else 3, deadline=None)
def test_whatever_goes_of_whatever_is_drawn_is_counted(net: Net, number: int) -> None:
    args = example(net, 2, number, torch.float64)
    program = fasp_fx.capture(build(net, number, torch.float64), args).program
    # Through which torch does not count.
    assume(not any(isinstance(node.target, HigherOrderOperator) for node in program.module.graph.nodes))
    analysis = fasp_fx.analysis.analyze_program(program, fasp_fx.passes.split_fused)
    chosen = draw_sets(analysis, np.random.default_rng(number))
    assume(chosen.any())
    gone = chosen[analysis.labels]
    plan = make_plan(program, analysis, Decision(gone))
    removed = {group.name: group.removed_sets for group in plan.groups}
    lost = [removed.get(group.name, 0) for group in analysis.chosen]
    smaller, none = remove(analysis, gone), [0] * len(lost)
    for count, before in ((lost, program), (none, program)):
        assert parameters_of(analysis).used(count) == sum(
            weight.numel() for weight in (smaller if count is lost else before).module.parameters()
        )
        assert macs_of(analysis).used(count) == operations(
            lambda at=smaller if count is lost else before: at.module(*at.flat_inputs(args, {}))
        )  # type: ignore[misc]


@given(problems(4, (30, 80), (1, 2, 3)))
@settings(max_examples=60, deadline=None)
def test_budgets_of_drawn_costs_are_met_from_below(problem: tuple[Budget, int, fasp_fx.Costs]) -> None:
    budget, round_to, costs = problem
    counted: list[Any] = [limit.resource for limit in budget.limits]
    for lost in (uniform(budget, round_to), Global()(budget, round_to, costs)):
        over = budget.over(lost)
        step = max(
            round_to * resource.shares[index] / resource.whole
            for resource in counted
            for index in range(len(budget.groups))
        )
        assert -max(step, 0.01) <= over <= 0 if len(counted) == 1 else over <= 0
        pairs = zip(budget.groups, lost, strict=True)
        assert all(gone == 0 or (group.size - gone) % round_to == 0 for group, gone in pairs)
        fewer = [
            [*lost[:i], gone - max(round_to, 1), *lost[i + 1 :]]
            for i, gone in enumerate(lost)
            if gone > round_to
        ]
        assert all(budget.over(other) > 0 for other in fewer), "a step could have stayed"


def test_a_model_that_generates_keeps_its_budgets() -> None:
    model = llama()
    pruned = fasp_fx.hf.prune(model, budget=(CacheBytes(0.75), Macs(0.8)), format="fasp-fx", **FAST)
    cache, macs = pruned.report.budgets
    assert (cache.dense, cache.used) == pruned.report.cache
    assert cache.used <= cache.allowed

    given = {name: value for name, value in stages_of(model).arguments().items() if name != "cache"}
    given["logits_to_keep"] = len(given["logits_to_keep"])

    def extend(served: Any) -> Callable[[], Any]:
        """The call that is counted, of a dense or pruned model."""
        with torch.no_grad():
            past = served(input_ids=given["input_ids"][:, :1].repeat(1, 5), use_cache=True).cache
        return lambda: served(**given, cache=past, use_cache=True)

    assert operations(extend(model)) == macs.dense
    assert operations(extend(pruned.model)) == macs.used <= macs.allowed


# What is refused, and when.


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            Parameters(0.001),
            (
                r"Parameters\(amount=0.001\) is out of reach: at least 346 of 23,322 parameters stay, a share"
                r" of 0.0149 with the usual round_to; let more stay"
            ),
        ),
        (Macs(100), r"Macs\(amount=100\) is out of reach: at least .* multiply-accumulates stay"),
        ((Bytes(0.5), Parameters(60)), r"Parameters\(amount=60\) is out of reach"),
        (Parameters(1.0), "the model meets the budget as it is: it has 23,322 parameters; allow less"),
        (Parameters(10**9), "the model meets the budget as it is"),
        (CacheBytes(0.5), "holds no cache of keys and values"),
    ],
)
def test_what_is_out_of_reach_is_said_before_anything_is_run(budget: Any, message: str) -> None:
    def batches() -> Any:
        raise AssertionError("data was asked for")
        yield

    _, _, _, once = captured("wide")
    with pytest.raises(fasp_fx.errors.BudgetError, match=message):
        fasp_fx.prune(once, calibration=batches(), budget=budget)


@pytest.mark.parametrize("budget", [Parameters(0.8), Macs(0.8)])
def test_a_model_in_parts_keeps_to_a_budget(budget: Cap) -> None:
    """Of all its parameters, and of the products of its parts."""
    model = Forks().eval()
    result = fasp_fx.prune(model, (X,), budget=budget, **FAST)
    (spent,) = result.report.budgets
    assert 0.6 * spent.dense < spent.used <= spent.allowed == pytest.approx(0.8 * spent.dense)
    if isinstance(budget, Parameters):
        for module, count in ((model, spent.dense), (result.module, spent.used)):
            assert sum(parameter.numel() for parameter in module.parameters()) == count


def nothing(budget: Budget, round_to: int | None) -> list[int]:
    return [0 for _ in budget.groups]


class Unknown(Cap):
    """Of a resource that nobody can count."""

    name, unit = "unknown", "things"  # type: ignore[misc]

    def resource(self, analysis: fasp_fx.Analysis) -> Resource:
        class Counted(Resource):
            def used(self, lost: Sequence[int]) -> float:
                return float("nan")

        return Counted(analysis.chosen, 100.0)


def inner() -> fasp_fx.Captured:
    """A product by an operator that torch counts, and models do not call."""

    def forward(m: Any, x: Tensor) -> Tensor:
        given = block(m, x).unsqueeze(-1), m.weight, None, [1], [0], [1], False, [0], 1
        return torch.ops.aten.convolution(*given)

    return fasp_fx.capture(wide(forward, hidden=12, weight=parameter(6, 6, 1)), (torch.randn(4, 6),))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"budget": Parameters(0.8), "allocation": nothing},
            r"the allocation leaves 20\.00% of the dense model's more than the budget allows",
        ),
        ({"budget": Unknown(0.8), "allocation": "uniform"}, r"used\(\) gives no number"),
        ({"budget": Unknown(0.8), "allocation": "global"}, r"used\(\) gives no number"),
        ({"budget": Macs(0.8)}, "are not counted, so macs are no budget here"),
    ],
)
def test_what_cannot_be_counted_or_is_not_kept_is_refused(options: dict[str, Any], message: str) -> None:
    _, args, _, once = captured("wide")
    once = inner() if len(options) == 1 else once
    with pytest.raises(fasp_fx.FaspError, match=message):
        fasp_fx.prune(once, calibration=[args], **{**FAST, **options})


# What is kept.


@given(
    st.lists(st.sampled_from([Parameters, Macs, Bytes, CacheBytes]), unique=True),
    st.one_of(st.floats(0.01, 1.0), st.integers(2, 2**60)),
)
def test_budgets_survive_json(kinds: list[Any], amount: float) -> None:
    config = fasp_fx.PruningConfig(budget=[kind(amount) for kind in kinds])
    again = fasp_fx.PruningConfig.from_json(config.to_json())
    assert (again, [type(cap.amount) for cap in again.budgets]) == (config, [type(amount)] * len(kinds))


def test_damaged_budgets_are_refused() -> None:
    for resource, amount in (("time", 1), ("macs", None), ("macs", "1"), ([], 1)):
        budget = [{"resource": resource, "amount": amount}]
        text = json.dumps({"format": "fasp_fx.document/1", "kind": "config", "budget": budget})
        with pytest.raises(fasp_fx.ArgumentError, match="budget"):
            fasp_fx.PruningConfig.from_json(text)


# The command line.

AMOUNTS = {
    "0.8": 0.8,
    "80%": 0.8,
    "100M": 10**8,
    "1.5G": 1_500_000_000,
    "400MB": 4 * 10**8,
    "2KiB": 2048,
    "0.5k": 500,
    "1234": 1234,
    "1.0": 1.0,
    "12b": 12,
}


def test_amounts_are_read_or_refused() -> None:
    found = {text: read_amount("--parameters", text) for text in AMOUNTS}
    assert found == AMOUNTS
    assert [type(amount) for amount in found.values()] == [type(amount) for amount in AMOUNTS.values()]
    for text in ("", "much", "-1", "0", "1.5", "120%", "1e9", "5X", "3iB", "0.0", "nan", "0.0001k"):
        with pytest.raises(fasp_fx.ArgumentError, match=r"--bytes '.*' is no amount"):
            read_amount("--bytes", text)
    for amount in (0, 0.0, -1, -0.5, math.nan, math.inf, True, "0.5", None):
        with pytest.raises(fasp_fx.ArgumentError, match="is no budget; give a share"):
            Parameters(amount)  # type: ignore[arg-type]
    for kind in KINDS.values():
        with pytest.raises(fasp_fx.ArgumentError, match=r"give a share .* or 1\.0 for all"):
            kind(1)
        assert (kind(1.0).allowed(50), kind(2).allowed(50), kind(0.5).allowed(50)) == (50, 2, 25)


def test_a_latency_is_what_a_function_of_the_widths_says() -> None:
    """No more than is allowed stays, and little less."""
    model = randomise(
        nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
    )

    def seconds(widths: Mapping[str, int]) -> float:
        return 1e-6 * (widths["2.weight"] + 3 * widths["4.weight"])

    options: dict[str, Any] = {"score": "magnitude", "restore": None}
    budget = (Latency(0.8, seconds), Parameters(0.95))
    result = fasp_fx.prune(model, (torch.randn(16, 8),), budget=budget, **options)
    spent = result.report.budgets[0]
    left = [result.module.get_parameter(name).shape[1] for name in ("2.weight", "4.weight")]
    assert (spent.dense, spent.used) == (pytest.approx(64 + 3 * 48), pytest.approx(left[0] + 3 * left[1]))
    assert 0.95 * spent.allowed < spent.used <= spent.allowed == pytest.approx(0.8 * spent.dense)
    assert "microseconds" in str(result.report)
    with pytest.raises(fasp_fx.ArgumentError, match=r"used\(\) gives no number"):
        fasp_fx.prune(
            model, (torch.randn(16, 8),), budget=Latency(0.8, lambda widths: float("nan")), **options
        )
    with pytest.raises(fasp_fx.ArgumentError, match="cannot be stored"):
        fasp_fx.PruningConfig(budget=Latency(0.8, seconds)).to_json()
