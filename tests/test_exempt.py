"""Query and key channels, pruned when asked: the dense model with the rows of W_Q and W_K at zero."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLES
from corpus.attention import attended
from corpus.blocks import WIDE, attention, feed_forward, handed, residual
from hypothesis import given, settings, strategies as st
from models import ZOO, linear, made, randomise, wide
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import fasp_fx
import fasp_fx.patterns
from fasp_fx.analysis import repeating


def heads(form: Callable[[Any, Tensor, Tensor], Any] = lambda m, q, x: q, shown: bool = False) -> nn.Module:
    """Attention of two heads, its scale left implicit; ``form`` stands at the queries."""

    def forward(m: Any, x: Tensor) -> Any:
        q, k, v = (part(x).unflatten(-1, (2, 6)).transpose(1, 2) for part in (m.q, m.k, m.v))
        found = m.out(F.scaled_dot_product_attention(form(m, q, x), k, v).transpose(1, 2).flatten(2))
        return (found, m.k(x)) if shown else found

    return randomise(made(forward, **linear(q=(6, 12), k=(6, 12), v=(6, 12), out=(12, 5))), std=0.7)


def drawn(samples: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, 7, 6, generator=torch.Generator().manual_seed(seed))


TWO = [drawn(5), drawn(5, 1), drawn(3)]


@pytest.mark.parametrize(
    ("make", "batches", "score"),
    [(heads, TWO, "fasp"), (heads, TWO, "magnitude")],
)
def test_the_channel_whose_product_is_least_goes_first(make: Any, batches: list[Tensor], score: Any) -> None:
    """By the norms over all sequences, whichever way heads lie beside them."""
    model = make()
    asked: dict[str, Any] = {"include": ("exempt",), "sparsity": 0.2, "quality": "fast", "score": score}
    result = fasp_fx.prune(model, (batches[0],), calibration=batches, **asked)
    (group,) = [group for group in result.plan.groups if not group.consumers]
    removed = next(part.removed for part in group.producers if part.name == "q.weight")
    with torch.no_grad():
        q, k = (
            torch.cat([part(x).flatten(0, 1) for x in batches]).reshape(-1, 2, 6).norm(dim=0)
            for part in (model.q, model.k)
        )
        rows = (part.weight.norm(dim=1).reshape(2, 6) for part in (model.q, model.k))
        worth = q * k if score == "fasp" else sum(rows)
    count = len(removed) // 2
    assert count
    assert set(removed) == {
        head * 6 + int(channel) for head in range(2) for channel in worth[head].argsort()[:count]
    }
    assert result.module.get_parameter("q.weight").shape[0] == 12 - 2 * count


@pytest.mark.parametrize("unbound", [True, False])
def test_tokens_are_found_at_parts_of_a_fused_projection(unbound: bool) -> None:
    """What splitting writes is recorded as what a capture does, so that calibration tells tokens apart."""

    def forward(m: Any, x: Tensor) -> Tensor:
        parts = m.qkv(x).reshape(*x.shape[:2], 3, 2, 6).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0) if unbound else (parts[0], parts[1], parts[2])
        return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = randomise(made(forward, qkv=nn.Linear(6, 36), out=nn.Linear(12, 6)), std=0.7)
    batches = [drawn(2, seed) for seed in range(4)]
    asked = {"include": ("exempt",), "sparsity": 0.3, "restore": None}
    result = fasp_fx.prune(model, (batches[0],), calibration=batches, **asked)
    assert any(not group.consumers for group in result.plan.groups)
    masked = zeroed(model, result.plan, producers=True)
    assert error(result.module(batches[1]), masked(batches[1])) <= TOLERANCE


def test_a_norm_between_makes_them_approximate_and_what_is_also_returned_stays() -> None:
    x = drawn(4)
    normalised = heads(lambda m, q, x: F.normalize(q, dim=-1))
    for model, status in ((normalised, "approximate"), (heads(shown=True), "frozen")):
        analysis = fasp_fx.analyze(model, (x,), include=("exempt",))
        (group,) = [group for group in analysis.groups if "k.weight" in {one.name for one in group.producers}]
        assert group.status == status
        assert group.name not in {one.name for one in analysis.chosen}
    assert "reaches output 1" in group.reason


def squared(outputs: Any, inputs: Any) -> Tensor:
    """A loss of as many terms as there are outputs."""
    return (outputs.square() / 2).flatten()


def exempt_name(model: nn.Module, x: Tensor) -> str:
    (group,) = [group for group in fasp_fx.analyze(model, (x,), include=("exempt",)).chosen if not group.uses]
    return group.name


def test_queries_and_keys_cost_what_the_loss_loses_with_them() -> None:
    """By autograd on the dense model: q_c times the gradient with respect to q_c, squared, summed over
    tokens, half of the mean over terms.
    """
    model = heads()
    batches = [drawn(4, seed) for seed in range(3)]
    costs = fasp_fx.measure(model, (batches[0],), calibration=batches, loss=squared, include=("exempt",))
    total, terms = torch.zeros(12, dtype=torch.float64), 0
    for x in batches:
        seen: list[Tensor] = []
        handle = model.q.register_forward_hook(
            lambda module, args, output, seen=seen: (output.retain_grad(), seen.append(output))[0]
        )
        loss = squared(model(x), {})
        loss.sum().backward()
        handle.remove()
        assert seen[0].grad is not None
        total += (seen[0] * seen[0].grad).detach().double().square().sum((0, 1))
        terms += loss.numel()
    cheapest = (total / terms / 2).reshape(2, 6).sort(dim=1).values
    expected = torch.cat([torch.zeros(1, dtype=torch.float64), cheapest.sum(0).cumsum(0)]).numpy()
    found = costs[exempt_name(model, batches[0])].losses
    assert found == pytest.approx(expected[: len(found)], rel=1e-4)
    assert len(found) > 4


def test_without_a_loss_they_cost_their_part_of_the_product() -> None:
    model, x = heads(), drawn(40)
    costs = fasp_fx.measure(model, (x[:4],), calibration=[x], loss=None, include=("exempt",))
    with torch.no_grad():
        q, k = (part(x).double().reshape(-1, 2, 6).norm(dim=0) for part in (model.q, model.k))
    energy = (q * k).square()
    cheapest = (energy / energy.sum() / 2).sort(dim=1).values
    found = costs[exempt_name(model, x[:4])].losses
    assert found[1:] == pytest.approx(cheapest.sum(0).cumsum(0).numpy()[: len(found) - 1], rel=1e-4)


# --- heads beside channels, and norms whose eps is not given


def test_heads_and_channels_in_one_plan_of_which_widths_alone_are_rounded() -> None:
    entry = ZOO["gpt2"]
    model = entry.build()
    result = fasp_fx.prune(
        model,
        (),
        entry.example(),
        granularity=("head", "channel"),
        sparsity=0.3,
        round_to=16,
        score="random",
        restore=None,
    )
    plan = result.plan
    assert plan.granularity == ("channel", "head")
    assert {(group.granularity, group.size) for group in plan.groups} == {("head", 4), ("channel", 256)}
    widths = [g.size - g.removed_sets for g in plan.groups if g.granularity == "channel"]
    assert not any(width % 16 for width in widths)
    found, expected = (one(**entry.example(3)) for one in (result.module, zeroed(model, plan)))
    assert error(found, expected) <= TOLERANCE


def _normed(dtype: torch.dtype) -> nn.Module:
    """A norm by mean squares, with the eps that torch takes where none is given, and values so small that it
    shows.
    """
    layers = (nn.Linear(8, 32), nn.RMSNorm(32, eps=None), nn.Linear(32, 4))
    return randomise(nn.Sequential(*layers), std=1e-3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_eps_that_is_not_given_is_that_of_the_type_that_is_computed_in(dtype: torch.dtype) -> None:
    model, x = _normed(dtype), torch.randn(64, 8).to(dtype)
    result = fasp_fx.prune(
        model, (x,), include=("approximate",), sparsity={"2.weight": 0.5}, score="random", restore=None
    )
    masked = zeroed(model, result.plan, producers=True)
    assert error(result.module(x).float(), masked(x).float()) < (1e-5 if dtype == torch.float32 else 2e-2)


# --- channels that lie along a dimension whose size varies


def sequences(samples: int, tokens: int = 5) -> Tensor:
    return torch.randn(samples, tokens, 8, generator=torch.Generator().manual_seed(samples))


def test_exempt_channels_are_chosen_by_batches_of_other_sizes() -> None:
    model, data = attended(), [sequences(size) for size in (4, 4, 3, 1)]
    asked: dict[str, Any] = {"include": ("exempt",), "sparsity": 0.3, "allocation": "uniform"}
    result = fasp_fx.prune(model, (sequences(4),), calibration=data, **asked)
    assert not [note for note in result.report.notes if "not run" in note or "whole" in note]
    assert any(not group.consumers for group in result.plan.groups)


def test_numbers_that_do_not_repeat_have_no_place_at_other_sizes() -> None:
    exported = torch.export.export(
        nn.Identity(), (torch.zeros(7, 1),), dynamic_shapes=({0: torch.export.Dim("size")},)
    )
    recorded = next(iter(exported.graph.nodes)).meta["val"].shape
    assert repeating(torch.tensor([0, 1, 2])[:, None], recorded) is None
    assert repeating(torch.tensor([0, 1, 2])[:, None], (3, 1)) is not None


# --- whole residual blocks that go


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
    result = fasp_fx.apply(model, fasp_fx.plan_from_sets(captured, removed, **DEPTH), (numbers(2, 3),))
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

    def allocation(budget: Any, round_to: int | None) -> list[int]:
        return [group.width if any(name in group.name for name in names) else 0 for group in budget.groups]

    return allocation


def pruned(model: nn.Module, example: dict[str, Any], *names: str, **options: Any) -> fasp_fx.Result:
    return fasp_fx.prune(
        model,
        (),
        example,
        calibration=([example] * 4),
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
    model.blocks[1].down.weight.detach().mul_(1e-4)  # type: ignore[union-attr, operator]
    for include, least in (((), 1), (("depth",), 0)):
        result = fasp_fx.prune(model, (x,), calibration=[x], sparsity=0.4, include=include, round_to=1)
        assert result.module.get_parameter("blocks.1.down.weight").shape[1] == least
        assert result.report.sparsity == pytest.approx(0.4, abs=0.05)


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
        format="fasp-fx",
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
            format="fasp-fx",
            **DEPTH,
        )


def test_outputs_that_are_handed_out_share_no_memory() -> None:
    model, x = wide(handed, WIDE, 20, down=nn.Linear(20, WIDE, bias=False)), torch.randn(4, 3, WIDE)
    first, second = pruned(model, {"x": x}, "down", restore=None).module(x)
    before = first.clone()
    second.zero_()
    assert torch.equal(first, before)
