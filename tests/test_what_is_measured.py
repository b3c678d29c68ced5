"""What is measured before anything is chosen: of which tokens, in which pieces, in which units, and with what
left as it was.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from corpus.blocks import MIXTURES
from models import block, linear, made, parameter, randomise, wide
from torch import Tensor, nn
from torch.nn import functional

import fasp_fx
from fasp_fx.analysis import Sparsity
from fasp_fx.errors import CalibrationWarning

WIDE = torch.float64


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def losses(captured: fasp_fx.Captured, batches: list[Any], **options: Any) -> dict[str, np.ndarray]:
    return {
        name: curve.losses
        for name, curve in fasp_fx.measure(captured, calibration=batches, **options).items()
    }


def prepared(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().to(WIDE).eval()


def _experts() -> nn.Module:
    """Four experts that all take part."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = torch.relu(torch.einsum("nd,edh->neh", x, self.up))
        return (torch.einsum("neh,ehd->ned", h, self.down) * self.router(x).softmax(-1)[..., None]).sum(1)

    return made(forward, router=nn.Linear(6, 4), up=parameter(4, 6, 10), down=parameter(4, 10, 6))


@pytest.mark.parametrize(
    "granularity", [pytest.param(("expert",), marks=pytest.mark.slow), ("channel", "expert")]
)
def test_experts_go_by_predicted_losses(granularity: tuple[str, ...]) -> None:
    """Of an expert that went no column is left, and the order goes on."""
    batches = [numbers(40, 6, seed=seed) for seed in range(4)]
    captured = fasp_fx.capture(prepared(_experts), (batches[0],))
    assert (np.diff(losses(captured, batches, granularity=granularity)["down"]) > 0).all()
    result = fasp_fx.prune(captured, calibration=batches, granularity=granularity, sparsity=0.5)
    assert result.report.sparsity == pytest.approx(0.5, abs=0.1)


def test_what_is_always_zero_goes_first_and_costs_nothing() -> None:
    model = prepared(lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)))
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


def _attending() -> nn.Module:
    """Every token sees those that are no padding."""

    def forward(self: Any, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(ids)
        scores = self.query(x) @ self.key(x).transpose(-1, -2) / 3
        seen = scores.masked_fill((attention_mask == 0)[:, None, :], -1e9).softmax(-1)
        x = x + self.out(seen @ self.value(x))
        return self.head(x + self.down(torch.relu(self.up(x))))

    layers = linear(query=(8, 8), key=(8, 8), value=(8, 12), out=(12, 8), up=(8, 24), down=(24, 8))
    return made(forward, embed=nn.Embedding(16, 8), **layers, head=nn.Linear(8, 16))


@pytest.mark.parametrize("loss", [pytest.param("outputs", marks=pytest.mark.slow), "next-token", None])
def test_padding_counts_nothing(loss: Any) -> None:
    """Neither what stands there, nor how much of it there is."""
    generator = torch.Generator().manual_seed(0)
    short: list[Any] = []
    for _ in range(6):
        ids, mask = torch.randint(0, 16, (4, 9), generator=generator), torch.ones(4, 9, dtype=torch.long)
        mask[1, 6:], mask[2, 3:] = 0, 0
        short.append({"ids": ids, "attention_mask": mask})
    captured = fasp_fx.capture(prepared(_attending), (), short[0])
    long = []
    for batch in short:
        ids = torch.where(batch["attention_mask"] == 0, 3, batch["ids"])
        long.append(
            {
                "ids": functional.pad(ids, (0, 7), value=5),
                "attention_mask": functional.pad(batch["attention_mask"], (0, 7)),
            }
        )
    expected, found = (losses(captured, batches, loss=loss) for batches in (short, long))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "layer", [lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), lambda: nn.GRU(8, 8)]
)
def test_a_first_dimension_that_is_time_is_not_divided(
    layer: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sequences ``[tokens, batch, columns]`` a single step alone is none."""

    def forward(self: Any, x: Tensor) -> Tensor:
        found = self.layer(x)
        return self.head(found[0] if isinstance(found, tuple) else found)

    x = 2 * numbers(12, 32, 8)
    model = prepared(lambda: made(forward, layer=layer(), head=nn.Linear(8, 3)))
    captured = fasp_fx.capture(model, (x[:, :4],))
    found = losses(captured, [x])
    monkeypatch.setattr("fasp_fx.pruning._method.in_pieces", lambda program, whole: whole)
    torch.testing.assert_close(found, losses(captured, [x]), rtol=1e-7, atol=0)


def test_sizes_of_outputs_are_not_those_of_the_first_image() -> None:
    """Of two numbers for an image, the first happens to be next to nothing for the first image."""
    images = numbers(64, 1, 8, 8)
    model: Any = prepared(
        lambda: made(
            lambda self, x: (self.left(h := self.body(x).mean((2, 3))), self.right(h)),
            body=nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU()),
            left=nn.Linear(10, 1),
            right=nn.Linear(10, 1),
        )
    )
    with torch.no_grad():
        for head, value in zip((model.left, model.right), model(images), strict=True):
            head.bias -= value[0] - 1e-6
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
        model = prepared(lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)))
        with torch.no_grad():
            for tensor in (model[2].weight, model[2].bias):  # type: ignore[index]
                tensor.mul_(scale)
        curves.append(losses(fasp_fx.capture(model, (batches[0],)), batches, loss="outputs")["2.weight"])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-3)


def _scores(change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Scores, which something is done to."""
    layers = (nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    return made(lambda self, x: change(self.layers(x)), layers=nn.Sequential(*layers))


@pytest.mark.parametrize(
    ("filling", "allocation"),
    [(torch.finfo(WIDE).min, "global"), (-torch.inf, "search")],
)
def test_masked_scores_say_nothing_of_how_large_outputs_are(
    filling: float, allocation: Literal["global", "search"]
) -> None:
    """What is measured is that of the model that returns the other scores alone, but for the random numbers,
    of which there are enough to agree.
    """
    batches = [numbers(2000, 6, seed=seed) for seed in range(2)]
    last = torch.tensor([False, False, False, True])
    captured = [
        fasp_fx.capture(prepared(lambda change=change: _scores(change)), (batches[0],))  # type: ignore[misc]
        for change in (lambda scores: scores[:, :3], lambda scores: scores.masked_fill(last, filling))
    ]
    expected, found = (losses(one, batches, quality="best", loss="outputs") for one in captured)
    for name, curve in expected.items():
        np.testing.assert_allclose(found[name], curve, rtol=0.1, atol=curve[-1] * 1e-3)
    for result in (
        fasp_fx.prune(one, calibration=batches, sparsity=0.3, loss="outputs", allocation=allocation)
        for one in captured
    ):
        assert "half the squared error of the outputs" in str(result.report.prediction)


def test_complex_weights_are_run_backwards() -> None:
    batches = [numbers(40, 6, seed=seed).float() for seed in range(4)]
    torch.manual_seed(0)
    model = made(
        lambda self, x: torch.view_as_real(self.turn(torch.complex(h := torch.relu(self.up(x)), 0.5 * h))),
        up=nn.Linear(6, 16),
        turn=nn.Linear(16, 8, dtype=torch.complex64),
    )
    result = fasp_fx.prune(model, (batches[0],), calibration=batches, sparsity=0.3)
    assert "half the squared error" in str(result.report.prediction)


def test_curves_that_do_not_fit_are_refused_before_anything_is_run(tmp_path: Path) -> None:
    batches = [numbers(40, 6, seed=seed) for seed in range(4)]
    captured = fasp_fx.capture(prepared(_experts), (batches[0],))
    costs = fasp_fx.measure(captured, calibration=batches, granularity=("expert",))
    with pytest.raises(fasp_fx.ArgumentError, match=r"curves are of .*granularity=\['expert'\]"):
        fasp_fx.prune(captured, calibration=iter(()), costs=costs)
    short = fasp_fx.Costs(costs, costs.fingerprint)
    with pytest.raises(
        fasp_fx.ArgumentError,
        match=r"no cost curve for 'down' up to 9 .*; measure with the granularity=",
    ):
        fasp_fx.prune(captured, calibration=iter(()), costs=short)
    assert costs.predicted({"up": 0}) == 0
    with pytest.raises(fasp_fx.errors.StoreError, match="not replaced"):
        costs.save(tmp_path)


# --- experts


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(batch))


def test_the_expert_that_gives_least_goes_and_as_many_stay_as_a_token_needs() -> None:
    model = randomise(MIXTURES["mixtral"](), std=0.5)
    model.get_parameter("model.layers.0.mlp.experts.down_proj").detach()[1] *= 1e-3
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


# --- models in parts


DATA = [torch.randn(64, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def _part(rounds: bool = False) -> nn.Module:
    """A block whose outputs are whole numbers, through which nothing runs back, if it ``rounds``."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = x + block(self, x)
        return torch.round(y * 16).int().float() / 16 if rounds else y

    return wide(forward, size=16, hidden=32)


def parts(first: bool, second: bool) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        for part in (self.first, self.second, self.third):
            x = part(x * 0 if float(x.detach().sum()) > 1e9 else x)
        return x

    torch.manual_seed(1)
    return made(forward, first=_part(first), second=_part(second), third=_part())


def lost(result: Any) -> dict[str, int]:
    return {group.name: group.removed_sets for group in result.plan.groups}


@pytest.mark.parametrize("first", [pytest.param(True, marks=pytest.mark.slow), False])
def test_all_parts_are_measured_without_gradients_once_one_has_none(first: bool) -> None:
    model = parts(first, not first)
    with pytest.warns(
        CalibrationWarning, match=f"in all parts of the model, since part '{'first' if first else 'second'}'"
    ) as told:
        found = fasp_fx.prune(model, (DATA[0],), calibration=DATA, sparsity=0.3)
    assert len([one for one in told if one.category is CalibrationWarning]) == 1
    asked = fasp_fx.prune(model, (DATA[0],), calibration=DATA, sparsity=0.3, loss=None)
    assert lost(found) == lost(asked)
    torch.testing.assert_close(*(list(each.module.parameters()) for each in (found, asked)), rtol=0, atol=0)


@pytest.mark.parametrize("data", [None, DATA])
def test_random_scores_are_others_in_each_part(data: Any) -> None:
    """Parts are alike, and so are the names in them."""
    result = fasp_fx.prune(
        parts(False, False),
        (DATA[0],),
        calibration=data,
        sparsity=0.3,
        score="random",
        allocation="uniform",
        restore=None,
    )
    assert len({tuple(group.consumers[0].removed) for group in result.plan.groups}) == 3
