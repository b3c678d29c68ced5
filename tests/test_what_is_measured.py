"""What is measured before anything is chosen: of which tokens, in which pieces, in which units, and with what
left as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fasp_fx
from fasp_fx.errors import CalibrationWarning

pytestmark = pytest.mark.usefixtures("shared_captures")

WIDE = torch.float64


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def losses(captured: fasp_fx.Captured, batches: list[Any], **options: Any) -> dict[str, np.ndarray]:
    return {
        name: curve.losses
        for name, curve in fasp_fx.measure(captured, calibration=batches, **options).items()
    }


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().to(WIDE).eval()


class Experts(nn.Module):
    """Four experts that all take part."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 10)), nn.Parameter(torch.randn(4, 10, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(torch.einsum("nd,edh->neh", x, self.up))
        return (torch.einsum("neh,ehd->ned", h, self.down) * self.router(x).softmax(-1)[..., None]).sum(1)


@pytest.mark.parametrize("granularity", [("expert",), ("channel", "expert")])
def test_experts_go_by_predicted_losses(granularity: tuple[str, ...]) -> None:
    """Of an expert that went no column is left, and the order goes on."""
    batches = [numbers(40, 6, seed=seed) for seed in range(4)]
    captured = fasp_fx.capture(made(Experts), (batches[0],))
    curve = losses(captured, batches, granularity=granularity)["down"]
    assert (np.diff(curve) > 0).all()
    result = fasp_fx.prune(captured, calibration=batches, granularity=granularity, sparsity=0.5)
    assert result.report.sparsity == pytest.approx(0.5, abs=0.1)


def test_what_is_always_zero_goes_first_and_costs_nothing() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)))
    with torch.no_grad():
        model[0].weight[:4], model[0].bias[:4] = 0, -1  # type: ignore[index]
        model[2].weight[:, :4] *= 30  # type: ignore[index]
        model[2].weight[:, 6:] *= 0.3  # type: ignore[index]
    batches = [numbers(50, 6, seed=seed) for seed in range(8)]
    captured = fasp_fx.capture(model, (batches[0],))
    assert losses(captured, batches)["2.weight"][4] == 0
    result = fasp_fx.prune(captured, calibration=batches, sparsity=4 / 12)
    assert result.plan.groups[0].consumers[0].removed == (0, 1, 2, 3)
    torch.testing.assert_close(result.module(batches[0]), model(batches[0]))


class Attending(nn.Module):
    """Every token sees those that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query, self.key, self.value = (
            nn.Embedding(16, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 12),
        )
        self.out, self.up, self.down, self.head = (
            nn.Linear(12, 8),
            nn.Linear(8, 24),
            nn.Linear(24, 8),
            nn.Linear(8, 16),
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        scores = (self.query(x) @ self.key(x).transpose(-1, -2) / 3).masked_fill(
            (mask == 0)[:, None, :], -1e9
        )
        x = x + self.out(scores.softmax(-1) @ self.value(x))
        x = x + self.down(torch.relu(self.up(x)))
        y: Tensor = self.head(x)
        return y


@pytest.mark.parametrize("loss", ["outputs", "next-token", None])
def test_padding_counts_nothing(loss: Any) -> None:
    """Neither what stands there, nor how much of it there is."""
    generator = torch.Generator().manual_seed(0)
    short: list[Any] = []
    for _ in range(6):
        ids, mask = torch.randint(0, 16, (4, 9), generator=generator), torch.ones(4, 9, dtype=torch.long)
        mask[1, 6:], mask[2, 3:] = 0, 0
        short.append({"ids": ids, "mask": mask})
    captured = fasp_fx.capture(made(Attending), (), short[0])
    long = []
    for batch in short:
        ids = torch.where(batch["mask"] == 0, 3, batch["ids"])
        long.append(
            {"ids": functional.pad(ids, (0, 7), value=5), "mask": functional.pad(batch["mask"], (0, 7))}
        )
    expected, found = (losses(captured, batches, loss=loss, padding_mask="mask") for batches in (short, long))
    assert expected.keys() == found.keys()
    for name, curve in expected.items():
        np.testing.assert_allclose(found[name], curve, rtol=1e-4)


class Sliding(nn.Module):
    """A window slides over the tokens, whose gradients are known at its output alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(16, 8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.widen, self.slide = nn.Conv1d(8, 24, 1), nn.Conv1d(24, 8, 3, padding=1)
        self.head = nn.Linear(8, 6)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        shown = mask[..., None].to(self.embed.weight.dtype)
        x = self.embed(ids) * shown
        x = x + self.down(torch.relu(self.up(x)))
        h = torch.relu(self.widen((x * shown).transpose(1, 2))) * mask[:, None].to(x.dtype)
        y: Tensor = self.head(x + self.slide(h).transpose(1, 2))
        return y


def test_padding_dilutes_nothing_where_gradients_are_known_at_outputs_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 16, (4, 20), generator=generator) for _ in range(12)]

    def padded(by: int) -> list[Any]:
        masks = torch.ones(4, 20, dtype=torch.long)
        return [
            {"ids": functional.pad(ids, (0, by)), "mask": functional.pad(masks, (0, by))} for ids in tokens
        ]

    captured = fasp_fx.capture(made(Sliding), (), padded(0)[0])
    none, some, much = (losses(captured, padded(by), padding_mask="mask") for by in (0, 10, 50))
    for name, curve in some.items():
        np.testing.assert_allclose(much[name], curve, rtol=1e-4)
        # One window in twenty more reads a token.
        np.testing.assert_allclose(curve, none[name], rtol=0.1)


class Recalling(nn.Module):
    """All sequences ``[batch, tokens, columns]`` read one memory ``[entries, columns]``."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up((self.query(x) @ memory.T).softmax(-1) @ memory)))
        return y


@pytest.mark.parametrize("sizes", [(4, 6), (6, 4)])
def test_what_all_sequences_share_is_not_divided_where_it_is_as_long_as_a_batch(
    sizes: tuple[int, int],
) -> None:
    captured = fasp_fx.capture(made(Recalling), (numbers(3, 5, 8), numbers(7, 8)))
    batches = [
        (numbers(size, 5, 8, seed=seed), numbers(6, 8, seed=9 + seed)) for seed, size in enumerate(sizes * 4)
    ]
    alone = [(x[row : row + 1], memory) for x, memory in batches for row in range(len(x))]
    found, expected = (losses(captured, given)["down.weight"] for given in (batches, alone))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


class TimeFirst(nn.Module):
    """Sequences ``[tokens, batch, columns]``, of which a single step alone is none."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x)
        y: Tensor = self.head(found[0] if isinstance(found, tuple) else found)
        return y


@pytest.mark.parametrize(
    "layer", [lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), lambda: nn.GRU(8, 8)]
)
def test_a_first_dimension_that_is_time_is_not_divided(
    layer: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = 2 * numbers(12, 32, 8)
    captured = fasp_fx.capture(made(lambda: TimeFirst(layer())), (x[:, :4],))
    found = losses(captured, [x])
    monkeypatch.setattr("fasp_fx.pruning._measuring.in_pieces", lambda program, whole: whole)
    for name, curve in losses(captured, [x]).items():
        np.testing.assert_allclose(found[name], curve)


class Two(nn.Module):
    """Two numbers for an image, of which the first happens to be next to nothing for the first image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU())
        self.left, self.right = nn.Linear(10, 1), nn.Linear(10, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).mean((2, 3))
        return self.left(h), self.right(h)


def test_sizes_of_outputs_are_not_those_of_the_first_image() -> None:
    images = numbers(64, 1, 8, 8)
    model = made(Two)
    with torch.no_grad():
        for head, value in zip((model.left, model.right), model(images), strict=True):
            head.bias -= value[0] - 1e-6  # type: ignore[operator]
    captured = fasp_fx.capture(model, (images[:4],))
    costs = fasp_fx.measure(captured, calibration=images.split(8))
    result = fasp_fx.prune(captured, calibration=images.split(8), costs=costs, sparsity=0.3)
    with torch.no_grad():
        pairs = zip(model(images), result.module(images), strict=True)
        error = sum(
            0.5 * float((dense - pruned).square().mean() / dense.square().mean()) for dense, pruned in pairs
        )
    rise = costs.predicted({group.name: group.removed_sets for group in result.plan.groups})
    assert error / 3 < rise < 3 * error, (
        "half the squared error relative to the mean square is what is predicted"
    )


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_units_of_the_outputs_do_not_matter(factor: float) -> None:
    batches = [numbers(40, 6, seed=seed) for seed in range(4)]
    curves = []
    for scale in (1.0, factor):
        model = made(lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)))
        with torch.no_grad():
            for tensor in (model[2].weight, model[2].bias):  # type: ignore[index]
                tensor.mul_(scale)
        curves.append(losses(fasp_fx.capture(model, (batches[0],)), batches, loss="outputs")["2.weight"])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-3)


class Masked(nn.Module):
    """Scores, some of which can be masked by a filling that holds in every batch."""

    def __init__(self, filling: float | None = None) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.filling = filling

    def forward(self, x: Tensor) -> Tensor:
        scores = self.last(torch.relu(self.middle(torch.relu(self.first(x)))))
        if self.filling is None:
            return scores[:, :3]
        return scores.masked_fill(torch.tensor([False, False, False, True]), self.filling)


@pytest.mark.parametrize("allocation", ["global", "search"])
@pytest.mark.parametrize("filling", [-1e9, -torch.inf, torch.finfo(WIDE).min])
def test_masked_scores_say_nothing_of_how_large_outputs_are(
    filling: float, allocation: Literal["global", "search"]
) -> None:
    """What is measured is that of the model that returns the other scores alone, but for the random numbers,
    of which there are enough to agree.
    """
    batches = [numbers(2000, 6, seed=seed) for seed in range(2)]
    captured = [fasp_fx.capture(made(build), (batches[0],)) for build in (Masked, lambda: Masked(filling))]
    expected, found = (losses(one, batches, quality="best", loss="outputs") for one in captured)
    for name, curve in expected.items():
        np.testing.assert_allclose(found[name], curve, rtol=0.1, atol=curve[-1] * 1e-3)
    for result in (
        fasp_fx.prune(one, calibration=batches, sparsity=0.3, loss="outputs", allocation=allocation)
        for one in captured
    ):
        assert any(
            "predicted rise of half the squared error of the outputs" in note for note in result.report.notes
        )


class Huge(Masked):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1e200


def test_outputs_whose_squares_cannot_be_held_are_no_loss() -> None:
    batches = [numbers(40, 6)]
    with pytest.warns(CalibrationWarning, match="whose square cannot be held"):
        fasp_fx.prune(made(Huge), (batches[0],), calibration=batches)


class Turning(nn.Module):
    """A complex weight between real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.turn = nn.Linear(6, 16), nn.Linear(16, 8, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        return torch.view_as_real(self.turn(torch.complex(h, 0.5 * h)))


def test_complex_weights_are_run_backwards() -> None:
    batches = [numbers(40, 6, seed=seed).float() for seed in range(4)]
    torch.manual_seed(0)
    result = fasp_fx.prune(Turning().eval(), (batches[0],), calibration=batches, sparsity=0.3)
    assert any("predicted rise of half the squared error" in note for note in result.report.notes)


def test_inference_mode_takes_no_gradients_away() -> None:
    batches = [numbers(40, 6, seed=seed) for seed in range(4)]
    captured = fasp_fx.capture(
        made(lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))), (batches[0],)
    )
    expected = losses(captured, batches)
    with torch.inference_mode():
        found = losses(captured, [batch.clone() for batch in batches])
    np.testing.assert_allclose(found["2.weight"], expected["2.weight"])


def test_what_no_weight_reads_matters_only_where_it_takes_part() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"ids": torch.randint(0, 16, (4, 9), generator=generator), "mask": torch.ones(4, 9, dtype=torch.long)}
        for _ in range(4)
    ]
    captured = fasp_fx.capture(made(Attending), (), batches[0])
    expected = fasp_fx.prune(captured, calibration=batches)
    for allocation in (None, "global"):
        found = fasp_fx.prune(
            captured, calibration=batches, include=("exempt",), exclude=("query",), allocation=allocation
        )  # type: ignore[arg-type]
        assert any("predicted rise" in note for note in found.report.notes)
        assert found.plan.groups == expected.plan.groups


def test_curves_that_do_not_fit_are_refused_before_anything_is_run(tmp_path: Path) -> None:
    batches = [numbers(40, 6, seed=seed) for seed in range(4)]
    captured = fasp_fx.capture(made(Experts), (batches[0],))
    costs = fasp_fx.measure(captured, calibration=batches, granularity=("expert",))
    with pytest.raises(fasp_fx.ArgumentError, match=r"curves are of granularity=\('expert',\)"):
        fasp_fx.prune(captured, calibration=iter(()), costs=costs)
    short = fasp_fx.Costs(costs, costs.fingerprint)
    with pytest.raises(
        fasp_fx.ArgumentError,
        match=r"curve of 'down' goes up to 3 .* 9 may go here; measure with the granularity=",
    ):
        fasp_fx.prune(captured, calibration=iter(()), costs=short)
    for lost, message in (
        ({"up": 1}, "no cost curve for 'up'"),
        ({"down": 4}, "up to 3"),
        ({"down": -1}, "whole number"),
        ({"down": 0.5}, "whole number"),
    ):
        with pytest.raises(fasp_fx.ArgumentError, match=message):
            costs.predicted(lost)  # type: ignore[arg-type]
    assert costs.predicted({"up": 0}) == 0
    with pytest.raises(fasp_fx.errors.StoreError, match="not replaced"):
        costs.save(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 0},
        {"rounds": 2.5},
        {"damping": 0},
        {"damping": float("nan")},
        {"damping": "a"},
        {"shrinkage": 2},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=next(iter(options))):
        fasp_fx.obs.OBS(**options)
