"""Stacks of weights of which a model takes one by one: experts in a loop, weights and scales of all layers in
one parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from fasp_fx.restoration import GRID
from models import made, parameter
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, nn
from zoo import VOCABULARY, randomise

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

COUNT, WIDTH, INNER = 3, 8, 12
ROWS, UNSEEN = (
    torch.randn(64, 5, generator=torch.Generator().manual_seed(0)),
    torch.randn(7, 5, generator=torch.Generator().manual_seed(1)),
)


def stacked(step: Callable[[Any, Tensor, int], Tensor], positions: tuple[int, ...] = (0, 1, 2)) -> nn.Module:
    """``step(model, x, i)`` for some ``i``, added up, between two layers."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.stack([step(self, x, i) * (i + 1) for i in positions]).sum(0).tanh())

    return made(
        forward,
        up=parameter(COUNT, INNER, WIDTH, scale=1 / 3),
        down=parameter(COUNT, WIDTH, INNER, scale=1 / 3),
        swapped=parameter(INNER, COUNT, WIDTH, scale=1 / 3),
        bias=parameter(COUNT, INNER),
        ups=nn.ModuleList(nn.Linear(WIDTH, INNER) for _ in range(COUNT)),
        downs=nn.ModuleList(nn.Linear(INNER, WIDTH) for _ in range(COUNT)),
        first=nn.Linear(5, WIDTH),
        last=nn.Linear(WIDTH, 4),
    )


def _unbound(m: Any, x: Tensor, i: int) -> Tensor:
    up, down = list(m.up)[i], m.down.unbind(0)[i]
    return F.linear(F.linear(x, up).tanh(), down)


def _both_ways(m: Any, x: Tensor, i: int) -> Tensor:
    whole = torch.einsum("beh,edh->bd", torch.einsum("bd,ehd->beh", x, m.up).tanh(), m.down)
    return whole + F.linear(F.linear(x, m.up[i]).tanh(), m.down[-1])


#: how one position is used, and the blocks of the group that the inner channels make
STEPS: dict[str, tuple[Callable[[Any, Tensor, int], Tensor], int]] = {
    "linear": (lambda m, x, i: F.linear(F.linear(x, m.up[i]).tanh(), m.down[i]), COUNT),
    "with biases": (lambda m, x, i: F.linear(F.linear(x, m.up[i], m.bias[i]).tanh(), m.down[i]), COUNT),
    "transposed products": (lambda m, x, i: (x @ m.up[i].t()).tanh() @ m.down[i].transpose(0, 1), COUNT),
    "unbound": (_unbound, COUNT),
    "along another dimension": (
        lambda m, x, i: F.linear(F.linear(x, m.swapped[:, i]).tanh(), m.down[i]),
        COUNT,
    ),
    "other consumers": (lambda m, x, i: m.downs[i](F.linear(x, m.up[i], m.bias[i]).tanh()), 1),
    "other producers": (lambda m, x, i: F.linear(m.ups[i](x).tanh(), m.down[i]), 1),
    "scales": (lambda m, x, i: m.downs[i](m.ups[i](x).tanh() * m.bias[i]), 1),
    "both ways": (_both_ways, 1),
}


def _assert_exact(model: nn.Module, result: fasp_fx.Result) -> None:
    reference = zeroed(model, result.plan)
    with torch.no_grad():
        dense, expected, found = model(UNSEEN), reference(UNSEEN), result.module(UNSEEN)
    assert error(expected, dense) > 100 * TOLERANCE, "nothing was tested"
    assert error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("name", STEPS)
def test_stacks_are_pruned_exactly(name: str) -> None:
    torch.manual_seed(0)
    step, blocks = STEPS[name]
    model = stacked(step)
    analysis = fasp_fx.analyze(model, (ROWS,))
    inner = [
        g
        for g in analysis.groups
        if g.status == "prunable" and g.size == INNER * (g.blocks if blocks > 1 else 1) and g.blocks == blocks
    ]
    assert inner, "\n".join(map(str, analysis.groups))
    for seed in range(2):
        torch.manual_seed(seed)
        result = fasp_fx.prune(model, (ROWS,), sparsity=0.4, score="random", restore=None)
        _assert_exact(model, result)
        shapes = dict(result.module.named_parameters())
        narrower = [
            name
            for name in ("up", "down", "swapped")
            if name in shapes and shapes[name].numel() < getattr(model, name).numel()
        ]
        assert narrower or name == "scales"


def test_every_expert_loses_its_own_channels() -> None:
    torch.manual_seed(0)
    model = stacked(STEPS["linear"][0])
    with torch.no_grad():
        for expert in range(COUNT):  # expert e hardly uses its channels 4e to 4e + 3
            model.down[expert, :, 4 * expert : 4 * expert + 4] *= 1e-3
    result = fasp_fx.prune(model, (ROWS,), calibration=[(ROWS,)], sparsity=0.3)
    (part,) = [part for group in result.plan.groups for part in group.consumers if part.name == "down"]
    assert (part.dim, part.block_dim) == (2, 0)
    for expert, removed in enumerate(part.removed):
        assert len(removed) > 0
        assert set(removed) <= set(range(4 * expert, 4 * expert + 4))


def test_restoration_solves_for_every_matrix_of_a_stack() -> None:
    torch.manual_seed(0)
    model = stacked(STEPS["linear"][0])
    options: Any = {"calibration": [(ROWS,)], "sparsity": {"down": 0.3}, "quality": "fast"}
    cut, restored = (fasp_fx.prune(model, (ROWS,), restore=how, **options) for how in (None, "least-squares"))
    (part,) = [part for group in restored.plan.groups for part in group.consumers if part.name == "down"]
    with torch.no_grad():
        x = model.first(ROWS).double()
        for expert, removed in enumerate(part.removed):
            inner = (x @ model.up[expert].double().t()).tanh()
            kept = [channel for channel in range(INNER) if channel not in removed]
            down, held = model.down[expert].double(), torch.arange(len(x)) % 4 == 3

            def solved(
                tokens: Tensor, strength: float, kept: list[int] = kept, down: Tensor = down
            ) -> Tensor:
                gram = tokens.t() @ tokens
                gram = gram + strength * gram.diagonal().mean() * torch.eye(INNER, dtype=torch.float64)
                return down @ gram[:, kept] @ torch.linalg.inv(gram[kept][:, kept])

            errors = {
                s: float((inner[held] @ down.t() - inner[held][:, kept] @ solved(inner[~held], s).t()).norm())
                for s in GRID
            }
            expected = solved(inner, min(errors, key=errors.__getitem__))
            found = dict(restored.module.named_parameters())["down"][expert].double()
            assert error(found, expected) <= TOLERANCE
        assert (restored.module(ROWS) - model(ROWS)).norm() < (cut.module(ROWS) - model(ROWS)).norm()


def test_what_is_never_taken_goes_along() -> None:
    torch.manual_seed(0)
    model = stacked(STEPS["linear"][0], positions=(0, 2))
    result = fasp_fx.prune(model, (ROWS,), sparsity=0.4, score="random", restore=None)
    _assert_exact(model, result)
    shapes = {name: tuple(parameter.shape) for name, parameter in result.module.named_parameters()}
    assert shapes["up"][0] == shapes["down"][0] == COUNT
    assert shapes["down"][2] < INNER


def test_a_plan_for_stacks_is_replayed_and_saved(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = stacked(STEPS["with biases"][0])
    result = fasp_fx.prune(model, (ROWS,), sparsity=0.4, score="random", restore=None)
    again = fasp_fx.apply(model, fasp_fx.PruningPlan.from_json(result.plan.to_json()), (ROWS,))
    loaded = fasp_fx.load(result.save(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again.module(UNSEEN), result.module(UNSEEN))
        assert torch.equal(loaded.module(UNSEEN), result.module(UNSEEN))


def test_jetmoe_is_pruned_exactly() -> None:
    """Experts sorted at run time, each a slice of one parameter, in the attention as well."""
    config = hf.JetMoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=4,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = randomise(hf.JetMoeForCausalLM(config)).double().eval()
    tokens = torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    result = fasp_fx.prune(
        model, (), {"input_ids": tokens, "use_cache": False}, sparsity=0.3, score="random", restore=None
    )
    reference = zeroed(model, result.plan)
    with torch.no_grad():
        found, expected = (
            result.module(input_ids=tokens, use_cache=False),
            reference(input_ids=tokens, use_cache=False),
        )
    assert error(expected, model(input_ids=tokens, use_cache=False)) > 1e-4
    assert error(found, expected) <= 1e-9
    assert result.plan.sparsity >= 0.25
