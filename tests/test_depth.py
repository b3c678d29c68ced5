"""Whole residual blocks that go: an identity stays, as exactly as where channels go. Models for it are in
corpus/blocks.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLES
from corpus.blocks import ENTRIES, WAYS, WIDE, attention, feed_forward, handed, residual
from hypothesis import given, settings, strategies as st
from models import ZOO, wide
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fasp_fx

DEPTH: dict[str, Any] = {"include": ("depth",), "granularity": ("channel", "head")}


KINDS = st.lists(
    st.tuples(st.sampled_from([feed_forward, attention]), st.booleans(), st.booleans()),
    min_size=1,
    max_size=3,
)


def numbers(samples: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(samples, tokens, 5, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=EXAMPLES // 3)
@given(KINDS, st.integers(0, 1 << 16), st.data())
def test_whatever_blocks_go_the_result_is_the_masked_dense_model(
    kinds: list[Any], seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    model = residual(kinds)
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
    assert len(products) == 2 + sum(3 if kind is feed_forward else 4 for kind in kept)
    left = {name for name, parameter in result.module.named_parameters() if parameter.numel()}
    for group in groups:
        if lost[group.name] >= group.width:
            assert left.isdisjoint(member.name for member in (*group.producers, *group.consumers))


def everything(names: tuple[str, ...]) -> Any:
    """An allocation that takes all of the groups whose names contain one of these words."""

    def allocation(budget: Any, round_to: int) -> list[int]:
        return [group.width if any(name in group.name for name in names) else 0 for group in budget.groups]

    return allocation


def pruned(model: nn.Module, example: dict[str, Any], *names: str, **options: Any) -> fasp_fx.Result:
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


def test_the_bias_of_what_goes_makes_up_for_its_mean() -> None:
    torch.manual_seed(0)
    model, x = residual([(feed_forward, True, False)] * 2), numbers(64, 5)
    masked, repaired = (
        pruned(model, {"x": x}, "blocks.0", restore=restore) for restore in (None, "least-squares")
    )
    errors = [(result.module(x) - model(x)).square().mean() for result in (masked, repaired)]
    assert errors[1] < errors[0]


def test_the_allocation_takes_the_block_that_does_nothing_and_leaves_it_where_not_asked() -> None:
    torch.manual_seed(0)
    model, x = residual([(feed_forward, True, False)] * 3), numbers(64, 5)
    with torch.no_grad():
        model.blocks[1].down.weight.mul_(1e-4)  # type: ignore[union-attr, operator]
    for include, least in (((), 1), (("depth",), 0)):
        result = fasp_fx.prune(model, (x,), calibration=[x], sparsity=0.4, include=include)
        kept = result.module.get_parameter("blocks.1.down.weight").shape[1]
        assert kept == least
        assert result.report.sparsity == pytest.approx(0.4, abs=0.05)


def test_results_are_saved_and_captured_again_and_a_compiler_applies_the_plan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = residual([(feed_forward, False, False), (attention, True, True)]), numbers(2, 3)
    result = pruned(model, {"x": x}, "blocks.0", "blocks.1", restore=None)
    expected = result.module(x)
    assert error(fasp_fx.load(result.save(tmp_path / "out")).module(x), expected) < 1e-6
    assert (
        error(
            torch.compile(model, backend=fasp_fx.backend(result.plan, inner="eager"))(x),
            zeroed(model, result.plan)(x),
        )
        < 1e-5
    )
    again = fasp_fx.capture(result.module, (x,)).program
    assert error(again.module(x), expected) < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_where_no_identity_can_stay_something_of_the_block_does(way: str) -> None:
    entry = ENTRIES[f"kept, {way}"]
    captured = fasp_fx.capture(entry.build(), *entry.inputs()[0])
    groups = fasp_fx.analyze(captured, **DEPTH).chosen
    assert all(group.needed for group in groups)
    for group in groups:
        with pytest.raises(fasp_fx.PlanError, match="keep one"):
            fasp_fx.plan_from_sets(captured, {group.name: range(group.size)}, **DEPTH)


def test_a_model_that_generates(tmp_path: Path) -> None:
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


def test_outputs_that_are_handed_out_share_no_memory() -> None:
    model, x = wide(handed, WIDE, 20, down=nn.Linear(20, WIDE, bias=False)), torch.randn(4, 3, WIDE)
    first, second = pruned(model, {"x": x}, "down", restore=None).module(x)
    before = first.clone()
    second.zero_()
    assert torch.equal(first, before)
