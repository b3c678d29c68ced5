"""Mixtures of experts: single neurons of theirs, gates and what they gate in turn among them, and whole
experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from models import made, parameter
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, nn
from zoo import VOCABULARY, randomise

import fasp_fx
from fasp_fx.testing import build, check_program, example
from fasp_fx.testing.specs import Experts, Linear, Net

pytestmark = pytest.mark.usefixtures("shared_captures")

_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "num_experts_per_tok": 2,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=4, **_SMALL)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(num_experts=4, moe_intermediate_size=24, head_dim=8, **_SMALL)
    ),
    # torch's kernel, which others are not traced with
    "mixtral in bfloat16": lambda: MODELS["mixtral"]().bfloat16(),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(num_local_experts=4, head_dim=8, **_SMALL)),
}
SLOW = pytest.mark.slow


def _tokens(batch: int, length: int) -> dict[str, Tensor | bool]:
    numbers = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch))
    return {"input_ids": numbers, "use_cache": False}


def _experts(plan: fasp_fx.PruningPlan) -> list[Any]:
    return [group for group in plan.groups if group.granularity == "expert"]


@contextmanager
def _never_chosen(
    model: nn.Module, plan: fasp_fx.PruningPlan, monkeypatch: pytest.MonkeyPatch
) -> Iterator[nn.Module]:
    """The dense model with the consumers' columns zero and the router's logits of experts that are gone at
    -inf.
    """
    masked = zeroed(model, plan)
    parts = [
        part
        for group in _experts(plan)
        for part in group.producers
        if part.name.endswith(("gate.weight", "router.weight"))
    ]
    routers = [(masked.get_parameter(part.name), list(part.removed)) for part in parts]
    assert len(routers) == len(_experts(plan))
    linear = nn.functional.linear

    def patched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found = linear(x, weight, bias)
        for router, gone in routers:
            if router is weight:
                found[..., gone] = float("-inf")
        return found

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "linear", patched)
        yield masked


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "mixtral in bfloat16",
        pytest.param("gpt_oss", marks=SLOW),
        pytest.param("qwen3_moe", marks=SLOW),
    ],
)
def test_experts_and_their_neurons_in_one_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(MODELS[name](), std=0.5)
    options: dict[str, Any] = {
        "granularity": ("channel", "expert"),
        "sparsity": 0.55,
        "score": "random",
        "restore": None,
    }
    result = fasp_fx.prune(model, (), _tokens(2, 7), **options)
    (experts,) = _experts(result.plan)
    assert experts.removed_sets
    (neurons,) = [
        g
        for g in result.plan.groups
        if g is not experts and any("down_proj" in part.name for part in g.consumers)
    ]
    lost = {
        part.name.rpartition(".")[2]: set(part.removed) for part in (*neurons.producers, *neurons.consumers)
    }
    assert 0 < len(lost["down_proj"]) < 24
    assert len(lost["down_proj"]) % 8 == 0
    if name == "gpt_oss":  # row 2i of its weight is a gate, row 2i + 1 what it gates
        both = {row for neuron in lost["down_proj"] for row in (2 * neuron, 2 * neuron + 1)}
        assert lost["gate_up_proj"] == lost["gate_up_proj_bias"] == both
    with _never_chosen(model, result.plan, monkeypatch) as masked:
        expected = masked(**_tokens(3, 9)).logits
    with torch.no_grad():
        found, dense = result.module(**_tokens(3, 9)).logits, model(**_tokens(3, 9)).logits
        assert error(found, expected) <= TOLERANCE
        assert error(expected, dense) > 100 * TOLERANCE


def test_the_expert_that_gives_least_goes_and_as_many_stay_as_a_token_needs() -> None:
    model = randomise(MODELS["mixtral"](), std=0.5)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.experts.down_proj")[1] *= 1e-3
    batches = [{"input_ids": _tokens(8, 12)["input_ids"]}]
    analysis = fasp_fx.analyze(model, (), _tokens(2, 7), granularity=("expert",))
    result = fasp_fx.prune(
        model,
        (),
        _tokens(2, 7),
        calibration=batches,
        granularity=("expert",),
        sparsity=0.2,
        quality="fast",
    )
    (group,) = analysis.chosen
    assert (group.granularity, group.size, group.needed) == ("expert", 4, 2)
    assert "4 experts" in str(group)
    counted = fasp_fx.analysis.Sparsity(analysis)
    assert analysis.max_sparsity == pytest.approx(counted.removed([2]))
    (removed,) = _experts(result.plan)
    assert all(part.removed == (1,) for part in (*removed.producers, *removed.consumers))


def test_every_invariant_of_experts_that_all_take_part() -> None:
    net = Net((Linear(6), Experts(5, 4, "dense", "bmm"), Linear(3)))
    wanted = ("mask-exact", "nothing", "plan", "steps")
    check_program(build(net), example(net), granularity=("expert", "channel"), invariants=wanted)


def routed(spoil: Callable[[Tensor], Tensor]) -> nn.Module:
    """Experts weighed by a softmax, of which the forward makes something else as well."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        gates = spoil(m.router(h).softmax(-1))
        given = torch.bmm(torch.bmm(h.expand(4, -1, -1), m.up).relu(), m.down)
        return (given * gates.T[:, :, None]).sum(0)

    weights = {"up": parameter(4, 8, 5), "down": parameter(4, 5, 6)}
    return made(forward, first=nn.Linear(6, 8), router=nn.Linear(8, 4), **weights)


@pytest.mark.parametrize(
    ("spoil", "prunable", "reason"),
    [
        (lambda gates: gates, True, ""),
        (lambda gates: gates * gates.max(-1, keepdim=True).values, True, ""),
        (lambda gates: gates[:, None].expand(-1, 2, -1).sum(1), True, ""),
        (lambda gates: (gates[:, None] + 0.1).sum(1), False, "mixed by aten.sum"),
        (lambda gates: gates.sum(-1, keepdim=True).expand(-1, 4) + 0 * gates, False, "mixed by aten.sum"),
        (
            lambda gates: gates + 0.1,
            False,
            "mixed by aten.sum",
        ),  # an expert that is never chosen would still give something
        (lambda gates: gates * gates.std(-1, keepdim=True), False, "mixed by aten.std"),
        (lambda gates: gates * (1 + gates.argmax(-1, keepdim=True)), False, "named by number to aten.add"),
        (
            lambda gates: gates * torch.arange(4.0, device=gates.device)[gates.argmax(-1)][:, None],
            False,
            "named by number to aten.index",
        ),
        (lambda gates: gates[:, [1, 0, 3, 2]], False, "one by one"),
    ],
    ids=[
        "as it is",
        "maximum",
        "added up",
        "offsets added up",
        "their sum",
        "offset",
        "spread",
        "number",
        "table",
        "order",
    ],
)
def test_what_a_router_may_do(spoil: Callable[[Tensor], Tensor], prunable: bool, reason: str) -> None:
    model = randomise(routed(spoil), std=0.5)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    analysis = fasp_fx.analyze(model, (x,), granularity=("expert",))
    assert bool(analysis.chosen) == prunable
    if not prunable:
        groups = [
            group
            for group in analysis.groups
            if any(member.name == "router.weight" and member.dim == 0 for member in group.producers)
        ]
        assert any(reason in group.reason for group in groups), [group.reason for group in groups]
        return
    result = fasp_fx.prune(model, (x,), granularity=("expert",), sparsity=0.4, score="random", restore=None)
    (experts,) = _experts(result.plan)
    gone = next(list(part.removed) for part in experts.producers if part.name == "router.weight")
    with torch.no_grad():
        found = result.module(x)
        model.router.bias[gone] = float("-inf")
        assert error(found, model(x)) <= TOLERANCE


def test_experts_compete_only_where_a_softmax_is_over_them() -> None:
    """A soft mixture: every expert computes on slots, which are means of all tokens by one softmax of the
    logits, over tokens; by another, over all slots, their results are handed back.
    """

    def forward(m: Any, x: Tensor) -> Tensor:
        logits = torch.einsum("bnd,des->bnes", x, m.phi)
        competing = logits.clone()
        for expert in m.gone:
            competing[:, :, expert] = -math.inf
        slots = torch.einsum("bnes,bnd->besd", logits.softmax(1), x)
        hidden = torch.relu(torch.einsum("besd,edh->besh", slots, m.up) + m.bias)
        given = torch.einsum("besh,ehd->besd", hidden, m.down)
        return torch.einsum("bnes,besd->bnd", competing.flatten(2).softmax(-1).view_as(logits), given)

    torch.manual_seed(0)
    weights = {"up": parameter(4, 8, 12), "bias": parameter(4, 1, 12), "down": parameter(4, 12, 8)}
    model, x = made(forward, phi=parameter(8, 4, 2), gone=(), **weights), torch.randn(2, 5, 8)
    asked: dict[str, Any] = {"granularity": ("expert",), "include": ("exempt",), "sparsity": 0.5}
    result = fasp_fx.prune(model, (x,), score="magnitude", restore=None, **asked)
    (group,) = result.plan.groups
    gone = next(part.removed for part in group.producers if part.name == "phi")
    assert len(gone) == 2
    x = torch.randn(3, 7, 8)
    with torch.no_grad():
        dense = model(x)
        model.gone = gone
        assert error(result.module(x), model(x)) <= TOLERANCE
        assert error(model(x), dense) > 100 * TOLERANCE
