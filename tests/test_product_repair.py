"""Repairs of queries for the channels that they lose together with keys, against dense solves of what they
minimise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captures import one_capture
from fasp_fx.restoration import GRID
from models import made
from oracle import zeroed
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import randomise

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

HEADS, SIZE, WIDTH = 2, 8, 12


class Attention(nn.Module):
    """Two heads of queries and one or two of keys; with rotations by a table that all calls share, or with a
    gain on normalised queries.
    """

    def __init__(
        self, keys: int = HEADS, rotated: bool = False, normalised: bool = False, shown: bool = False
    ) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(WIDTH, HEADS * SIZE), nn.Linear(HEADS * SIZE, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, keys * SIZE) for _ in range(2))
        self.keys, self.rotated, self.normalised, self.shown = keys, rotated, normalised, shown
        self.gain = nn.Parameter(torch.ones(SIZE))
        self.register_buffer("frequencies", 2.0 ** -torch.arange(SIZE // 2))

    def queries_and_keys(self, x: Tensor, frequencies: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k = (_heads(part(x)) for part in (self.q, self.k))
        if self.normalised:
            q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6) * self.gain
        if self.rotated:
            turns = self.frequencies if frequencies is None else frequencies
            angles = torch.cat([torch.arange(x.shape[1])[:, None] * turns] * 2, -1)
            q, k = (part * angles.cos() + _turned(part) * angles.sin() for part in (q, k))
        return q, k

    def attended(self, q: Tensor, k: Tensor, x: Tensor, **options: Any) -> Tensor:
        """What queries and keys make of the values, beside their input."""
        mixed = F.scaled_dot_product_attention(q, k, _heads(self.v(x)), **options)
        return x + self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, frequencies: Tensor | None = None) -> Any:
        q, k = self.queries_and_keys(x, frequencies)
        found = self.attended(q, k, x, is_causal=True, enable_gqa=self.keys < HEADS)
        return (found, q.sum(-1)) if self.shown else found


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, SIZE)).transpose(1, 2)


class Layers(nn.Module):
    """Layers whose queries and keys are turned by one table."""

    def __init__(self, count: int = 3, normalised: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(rotated=True, normalised=normalised) for _ in range(count))
        self.register_buffer("frequencies", 2.0 ** -torch.arange(SIZE // 2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.frequencies)
        return x


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


def expected(model: Attention, batches: list[Tensor], removed: list[int], strength: float) -> Tensor:
    """The repaired weight and bias of queries, ``[rows, inputs + 1]``, by solves in float64; what went is as
    it was.
    """
    weights = torch.cat([model.q.weight, model.q.bias[:, None]], 1).detach().double()
    found = weights.clone()
    operands = [tuple(part.detach().double()[0] for part in model.queries_and_keys(x)) for x in batches]
    for head in range(HEADS):
        rows = range(head * SIZE, (head + 1) * SIZE)
        kept = torch.tensor([row - rows.start for row in rows if row not in removed])
        pairs = [
            (q[head], k[head * model.keys // HEADS] - k[head * model.keys // HEADS].mean(0))
            for q, k in operands
        ]
        if model.rotated:  # one factor for each two channels that are turned into each other
            stay = kept[kept < SIZE // 2]
            sets = torch.arange(SIZE) % (SIZE // 2)
            parts = [
                torch.stack([q[:, sets == f] @ k[:, sets == f].T for f in range(SIZE // 2)]).flatten(1)
                for q, k in pairs
            ]
            gram = sum(part @ part.T for part in parts)
            wanted = gram[stay].sum(1) + strength * gram.diagonal().mean()
            factors = torch.linalg.solve(
                gram[stay][:, stay] + strength * gram.diagonal().mean() * torch.eye(len(stay)), wanted
            )
            for place, f in enumerate(stay.tolist()):
                for row in (f, f + SIZE // 2):
                    found[rows.start + row] = factors[place] * weights[rows.start + row]
        else:
            gram = sum(q.square().sum() * k.T @ k for q, k in pairs)
            damping = strength * gram.diagonal().mean()
            change = (gram + damping * torch.eye(SIZE))[:, kept] @ torch.linalg.inv(
                gram[kept][:, kept] + damping * torch.eye(len(kept))
            )
            found[rows.start + kept] = change.T @ weights[list(rows)]
    return found


@pytest.mark.parametrize("keys", [HEADS, 1])
@pytest.mark.parametrize("rotated", [False, True])
def test_queries_are_repaired_as_a_dense_solve_says(keys: int, rotated: bool) -> None:
    model, batches = randomise(Attention(keys, rotated), std=0.4).double(), [x.double() for x in data()]
    with one_capture():
        result = pruned(model, batches)
    removed = lost(result)
    stay = [row for row in range(HEADS * SIZE) if row not in removed]
    weights = dict(result.module.named_parameters())
    found = torch.cat([weights["q.weight"], weights["q.bias"][:, None]], 1).detach().double()
    solved = {
        strength: expected(model, batches, removed, strength)[stay].chunk(HEADS) for strength in (*GRID, 1e9)
    }
    for head, own in enumerate(found.chunk(HEADS)):  # each with the strength that serves it best
        errors = {
            strength: float((own - rows[head]).norm() / own.norm()) for strength, rows in solved.items()
        }
        assert min(errors.values()) < 1e-5
        assert errors[1e9] > (1e-4 if rotated else 1e-2)


def test_a_repair_brings_the_outputs_nearer() -> None:
    model, batches = randomise(Attention(), std=0.4), data(12)
    with one_capture():
        repaired, cut = (pruned(model, batches[:8], restore) for restore in ("least-squares", None))
    assert lost(repaired) == lost(cut)
    with torch.no_grad():
        errors = [
            sum(float((result.module(x) - model(x)).square().sum()) for x in batches[8:])
            for result in (repaired, cut)
        ]
    assert errors[0] < 0.5 * errors[1]
    line = next(line for line in repaired.report.lines if line.status == "exempt")
    assert line.error_restored < line.error_cut
    assert line.held_restored < line.held_cut


def test_a_gain_that_heads_share_is_repaired_where_a_norm_stands_between() -> None:
    model, batches = randomise(Attention(normalised=True), std=0.4), data()
    result = pruned(model, batches, include=("exempt", "approximate"), sparsity={"*gain*": 0.5})
    weights = dict(result.module.named_parameters())
    removed = lost(result, "gain")
    stay = [row for row in range(SIZE) if row not in removed]
    assert 0 < len(stay) < SIZE
    assert not torch.allclose(weights["gain"], model.gain[stay])
    rows = [head * SIZE + row for head in range(HEADS) for row in stay]
    assert torch.equal(weights["q.weight"], model.q.weight[rows])


def test_queries_that_are_seen_elsewhere_stay_as_they_are() -> None:
    model, batches = randomise(Attention(shown=True), std=0.4), data()
    result = fasp_fx.prune(model, (batches[0],), calibration=batches, sparsity=0.2, include=("exempt",))
    assert not any(part.name == "q.weight" for group in result.plan.groups for part in group.producers)
    for x in batches[:2]:
        assert torch.allclose(result.module(x)[1], model(x)[1], atol=1e-5)


def test_padding_plays_no_part() -> None:
    class Masked(Attention):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return self.attended(*self.queries_and_keys(x), x, attn_mask=mask[:, None, None].bool())

    model, found = randomise(Masked(), std=0.4), []
    for filling in (0.0, 100.0):
        padded = [
            (torch.cat([x, torch.full((1, 5, WIDTH), filling)], 1), torch.arange(21)[None] < 16)
            for x in data()
        ]
        with one_capture():
            result = pruned(model, padded, padding_mask="mask")
        found.append(result.module.get_parameter("q.weight"))
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_layers_that_share_a_table_lose_pairs_of_their_own() -> None:
    model, batches = randomise(Layers(2), std=0.4).double(), [x.double() for x in data()]
    with one_capture():
        analysis = fasp_fx.analyze(model, (batches[0],), include=("exempt",))
        result = pruned(model, batches)
        again = fasp_fx.apply(model, fasp_fx.PruningPlan.from_json(result.plan.to_json()), (batches[0],))
        cut = pruned(model, batches, None)
    assert len([group for group in analysis.groups if group.status == "exempt"]) == 2
    assert {copied.source for copied in result.plan.copies} == {"frequencies"}
    removed = [lost(cut, f"layers.{layer}.q.weight") for layer in range(2)]
    assert len({tuple(rows) for rows in removed}) > 1
    assert again.plan.groups == result.plan.groups
    x = torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(2)).double()
    exported = fasp_fx.passes.Prune(again.plan)(torch.export.export(model, (batches[0],)))
    compiled = torch.compile(model, backend=fasp_fx.backend(again.plan, inner="eager"))
    with torch.no_grad():
        assert torch.allclose(exported.module()(batches[0]), again.module(batches[0]), atol=1e-9)
        assert torch.allclose(compiled(x), again.module(x), atol=1e-9)
    fasp_fx.testing.check_program(model, (batches[0],), invariants=("mask-exact",), include=("exempt",))

    with one_capture():
        # Nothing of the tables, which are one again.
        whole = pruned(model, batches, sparsity={"*out.weight": 0.5})
    for found, count in ((whole, 1), (cut, len({tuple(rows) for rows in removed}))):
        assert len([name for name, _ in found.module.named_buffers() if "_of_" in name]) == count
    masked = zeroed(model, cut.plan, producers=True)
    with torch.no_grad():
        for x in (batches[0], torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(1)).double()):
            assert torch.allclose(cut.module(x), masked(x), atol=1e-9)
            assert not torch.allclose(cut.module(x), model(x), atol=1e-3)


def test_norms_before_a_table_that_layers_share() -> None:
    model, batches = randomise(Layers(2, normalised=True), std=0.4).double(), [x.double() for x in data()]
    result = pruned(model, batches, include=("exempt", "approximate"), sparsity={"*gain*": 0.5})
    assert len(result.plan.copies) == 2
    assert all(
        f"layers.{layer}.gain" in {part.name for group in result.plan.groups for part in group.producers}
        for layer in range(2)
    )


def test_the_errors_in_the_report_are_those_of_the_products() -> None:
    """Sequences whose queries and keys are large and small the other way round, so that no map is nearest for
    all.
    """

    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (part[:, None] for part in (self.q(x), self.k(y), self.v(y)))
        return self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])

    torch.manual_seed(0)
    model: Any = made(forward, **{name: nn.Linear(WIDTH, WIDTH) for name in ("q", "k", "v", "out")}).double()
    batches = []
    for number in range(8):
        x, y = (torch.randn(1, 16, 4).double() @ torch.randn(4, WIDTH).double() for _ in range(2))
        batches.append((x * (4.0 if number % 2 else 0.5), y * (0.5 if number % 2 else 4.0)))
    result = pruned(model, batches)
    removed, weights = lost(result), dict(result.module.named_parameters())
    stay = [row for row in range(WIDTH) if row not in removed]
    whole = cut = repaired = 0.0
    with torch.no_grad():
        for x, y in batches:
            q, k = model.q(x)[0], model.k(y)[0]
            found = F.linear(x, weights["q.weight"], weights["q.bias"])[0]
            k = k - k.mean(0)
            whole += float((q @ k.T).square().sum())
            cut += float((q @ k.T - q[:, stay] @ k[:, stay].T).square().sum())
            repaired += float((q @ k.T - found @ k[:, stay].T).square().sum())
    line = next(line for line in result.report.lines if line.status == "exempt")
    assert line.error_cut == pytest.approx(cut / whole, rel=1e-6)
    assert line.error_restored == pytest.approx(repaired / whole, rel=1e-6)
    assert repaired < 0.95 * cut


def test_one_head_of_queries_that_meets_several_of_keys() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = (_heads(part(x)) for part in (self.q, self.k, self.v))
        return x + self.out(((q @ k.mT / 3).softmax(-1) @ v).transpose(1, 2).flatten(2))

    sizes = {"q": (WIDTH, SIZE), "k": (WIDTH, 4 * SIZE), "v": (WIDTH, 4 * SIZE), "out": (4 * SIZE, WIDTH)}
    model = made(forward, **{name: nn.Linear(*size) for name, size in sizes.items()})
    result = pruned(randomise(model, std=0.4), data())
    line = next(line for line in result.report.lines if line.status == "exempt")
    assert line.error_restored < line.error_cut


def test_a_table_that_is_large_beside_the_weights_is_shared_on() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k = (part * self.table[: x.shape[1]] for part in layer.queries_and_keys(x))
            x = layer.attended(q, k, x)
        return x

    model = made(forward, layers=nn.ModuleList(Attention() for _ in range(2)), table=torch.rand(500, SIZE))
    analysis = fasp_fx.analyze(randomise(model, std=0.4), (data()[0],), include=("exempt",))
    assert len([group for group in analysis.groups if group.status == "exempt"]) == 1
