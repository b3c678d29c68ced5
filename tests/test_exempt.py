"""Query and key channels, pruned when asked: the dense model with the rows of W_Q and W_K at zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import made, randomise
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx


def heads(form: Callable[[Any, Tensor, Tensor], Any] = lambda m, q, x: q, shown: bool = False) -> nn.Module:
    """Attention of two heads, its scale left implicit; ``form`` stands at the queries."""

    def forward(m: Any, x: Tensor) -> Any:
        q, k, v = (part(x).unflatten(-1, (2, 6)).transpose(1, 2) for part in (m.q, m.k, m.v))
        found = m.out(F.scaled_dot_product_attention(form(m, q, x), k, v).transpose(1, 2).flatten(2))
        return (found, m.k(x)) if shown else found

    layers = {name: nn.Linear(6, 12) for name in "qkv"}
    return randomise(made(forward, **layers, out=nn.Linear(12, 5)), std=0.7)


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
    with torch.no_grad():
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
