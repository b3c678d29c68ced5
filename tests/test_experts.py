"""Which experts of a mixture go; that they go exactly is in corpus/blocks.py."""

from __future__ import annotations

import pytest
import torch
from corpus.blocks import MIXTURES, experts
from models import randomise

import fasp_fx
from fasp_fx.analysis import Sparsity
from fasp_fx.testing import build, check_program, example
from fasp_fx.testing.specs import Experts, Linear, Net


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(batch))


def test_the_expert_that_gives_least_goes_and_as_many_stay_as_a_token_needs() -> None:
    model = randomise(MIXTURES["mixtral"](), std=0.5)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.experts.down_proj")[1] *= 1e-3
    captured = fasp_fx.capture(model, (), {"input_ids": _ids(2, 7), "use_cache": False})
    analysis = fasp_fx.analyze(captured, granularity=("expert",))
    (group,) = analysis.chosen
    assert (group.granularity, group.size, group.needed) == ("expert", 4, 2)
    assert analysis.max_sparsity == pytest.approx(Sparsity(analysis).removed([2]))
    result = fasp_fx.prune(
        captured,
        calibration=[{"input_ids": _ids(8, 12)}],
        granularity=("expert",),
        sparsity=0.2,
        quality="fast",
    )
    (removed,) = [group for group in result.plan.groups if group.granularity == "expert"]
    assert all(part.removed == (1,) for part in (*removed.producers, *removed.consumers))


def test_every_invariant_of_experts_that_all_take_part() -> None:
    net = Net((Linear(6), Experts(5, 4, "dense", "bmm"), Linear(3)))
    wanted = ("mask-exact", "nothing", "plan", "steps")
    check_program(build(net), example(net), granularity=("expert", "channel"), invariants=wanted)


def test_a_plan_made_before_experts_read_one_channel_goes_on_after() -> None:
    x = torch.randn(6, 5, dtype=torch.float64)
    for seed in (1, 2):
        check_program(experts(2).double(), (x,), seed=seed, invariants=("mask-exact", "steps"))
