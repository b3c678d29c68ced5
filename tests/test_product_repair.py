"""Repairs of queries for the channels that they lose together with keys, against dense solves of what they
minimise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fasp_fx.restoration import GRID
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import randomise

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

HEADS, SIZE, WIDTH = 2, 8, 12


class Attention(nn.Module):
    """Two heads of queries and one or two of keys, with rotations or without."""

    def __init__(self, keys: int = HEADS, rotated: bool = False) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(WIDTH, HEADS * SIZE), nn.Linear(HEADS * SIZE, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, keys * SIZE) for _ in range(2))
        self.keys, self.rotated = keys, rotated
        self.register_buffer("frequencies", 2.0 ** -torch.arange(SIZE // 2))

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (_heads(part(x)) for part in (self.q, self.k))
        if self.rotated:
            angles = torch.cat([torch.arange(x.shape[1])[:, None] * self.frequencies] * 2, -1)
            q, k = (part * angles.cos() + _turned(part) * angles.sin() for part in (q, k))
        return q, k

    def attended(self, q: Tensor, k: Tensor, x: Tensor, **options: Any) -> Tensor:
        """What queries and keys make of the values, beside their input."""
        mixed = F.scaled_dot_product_attention(q, k, _heads(self.v(x)), **options)
        return x + self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.attended(*self.queries_and_keys(x), x, is_causal=True, enable_gqa=self.keys < HEADS)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, SIZE)).transpose(1, 2)


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def data(count: int = 8) -> list[Tensor]:
    """Sequences whose channels depend on each other, so that those that stay can stand in for
    those that go.
    """
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(4, WIDTH, generator=generator)
    return [
        torch.randn(1, 16, 4, generator=generator) @ mix
        + 0.05 * torch.randn(1, 16, WIDTH, generator=generator)
        for _ in range(count)
    ]


def pruned(model: nn.Module, batches: list[Any], restore: Any = "least-squares", **options: Any) -> Any:
    asked = {
        "include": ("exempt",),
        "sparsity": {"*q.weight*": 0.5},
        "score": "fasp",
        "allocation": "uniform",
    }
    example = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    return fasp_fx.prune(model, example, calibration=batches, restore=restore, **asked | options)


def lost(result: Any, name: str = "q.weight") -> list[int]:
    """The rows of the queries' weight that went."""
    return next(
        list(part.removed) for group in result.plan.groups for part in group.producers if part.name == name
    )


def parts_of(model: Attention, batches: list[Tensor]) -> Tensor:
    """What each channel set gives of the products of queries and keys, which count without their mean,
    ``[heads, sets, all products]``.
    """
    sets = torch.arange(SIZE) % (SIZE // 2 if model.rotated else SIZE)
    found = []
    for x in batches:
        q, k = (part.detach().double()[0] for part in model.queries_and_keys(x))
        k = (k - k.mean(1, keepdim=True)).repeat_interleave(HEADS // model.keys, 0)
        each = [q[..., sets == f] @ k[..., sets == f].mT for f in range(int(sets.max()) + 1)]
        found.append(torch.stack(each, 1).flatten(2))
    return torch.cat(found, 2)


@pytest.mark.parametrize("keys", [HEADS, 1])
@pytest.mark.parametrize("rotated", [False, True])
def test_queries_are_repaired_as_a_dense_solve_says(keys: int, rotated: bool) -> None:
    """And the errors in the report are those of the products."""
    model, batches = randomise(Attention(keys, rotated), std=0.4).double(), [x.double() for x in data()]
    result = pruned(model, batches)
    weights, removed = dict(result.module.named_parameters()), lost(result)
    stay = [row for row in range(HEADS * SIZE) if row not in removed]
    found = (weights["q.weight"] / model.q.weight[stay]).detach().chunk(HEADS)
    assert torch.allclose(weights["q.bias"] / model.q.bias[stay], torch.cat(found)[:, 0])
    errors = torch.zeros(2).double()
    for head, parts in enumerate(parts_of(model, batches)):
        kept = sorted({(row - head * SIZE) % len(parts) for row in stay if row // SIZE == head})
        factors, gram = found[head][: len(kept), 0], parts @ parts.T
        solved = []
        for strength in (*GRID, 1e9):
            damping = strength * gram.diagonal().mean()
            inner = gram[kept][:, kept] + damping * torch.eye(len(kept))
            solved.append(torch.linalg.solve(inner, gram[kept].sum(1) + damping))
        assert min(float((factors - one).norm()) for one in solved) < 1e-5
        for index, own in enumerate((torch.ones_like(factors), factors)):
            missing = torch.ones(len(gram)).double()
            missing[kept] -= own
            errors[index] += missing @ gram @ missing / gram.sum() / HEADS
    assert errors[1] < errors[0]
    line = next(line for line in result.report.lines if line.status == "exempt")
    assert line.error_cut == pytest.approx(float(errors[0]), rel=1e-6)
    assert line.error_restored == pytest.approx(float(errors[1]), rel=1e-6)


def test_padding_plays_no_part() -> None:
    class Masked(Attention):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            return self.attended(*self.queries_and_keys(x), x, attn_mask=attention_mask[:, None, None].bool())

    model, found = randomise(Masked(), std=0.4), []
    for filling in (0.0, 100.0):
        padded = [
            (torch.cat([x, torch.full((1, 5, WIDTH), filling)], 1), torch.arange(21)[None] < 16)
            for x in data()
        ]
        result = pruned(model, padded)
        found.append(result.module.get_parameter("q.weight"))
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-6)
