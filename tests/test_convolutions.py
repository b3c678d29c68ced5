"""Convolutions, norms that keep channels apart, and what stands between them: pruned exactly, scored and
restored by their windows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import made, parameter
from oracle import assert_exact
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import randomise

import fasp_fx
from fasp_fx.testing import check_program

pytestmark = pytest.mark.usefixtures("shared_captures")


def excited(channels: int) -> nn.Module:
    """Squeeze and excite."""
    return made(
        lambda self, x: x * self.up(self.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid(),
        down=nn.Conv2d(channels, 3, 1),
        up=nn.Conv2d(3, channels, 1),
    )


def residual(inner: nn.Module) -> nn.Module:
    return made(lambda self, x: x + self.inner(x), inner=inner)


def _chain(*middle: nn.Module, channels: int = 8, out: int | None = None) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), *middle, nn.Conv2d(out or channels, 5, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: _chain(
        nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1, dilation=2)
    ),
    "instance norm": lambda: _chain(nn.InstanceNorm2d(8, affine=True), nn.PReLU(8)),
    "grouped": lambda: _chain(nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.GELU(), out=12),
    "depthwise": lambda: _chain(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)),
    "transposed": lambda: _chain(
        nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1), nn.ReLU(), out=6
    ),
    "transposed grouped": lambda: _chain(
        nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), nn.ReLU(), out=6
    ),
    "pools": lambda: _chain(
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(scale_factor=2),
    ),
    "channel shuffle": lambda: _chain(made(lambda self, x: F.channel_shuffle(x, 2)), nn.ReLU()),
    "pixel shuffle": lambda: _chain(nn.PixelShuffle(2), nn.ReLU(), channels=24, out=6),
    "pixel unshuffle": lambda: _chain(nn.PixelUnshuffle(2), nn.ReLU(), out=32),
    "squeeze and excite": lambda: _chain(nn.BatchNorm2d(8), excited(8)),
    "concatenation": lambda: _chain(
        made(lambda self, x: torch.cat([x, self.conv(x)], dim=1), conv=nn.Conv2d(8, 6, 3, padding=1)),
        nn.ReLU(),
        out=14,
    ),
    "residual": lambda: _chain(
        residual(nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 1))),
        nn.BatchNorm2d(8),
    ),
    "gated": lambda: _chain(nn.GLU(dim=1), out=4),
    "flattened into a linear layer": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 25, 5)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_mask_exact(name: str) -> None:
    model = randomise(MODELS[name](), std=0.4)
    example, unseen = (
        torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(batch)) for batch in (2, 3)
    )
    most = fasp_fx.analyze(model, (example,)).max_sparsity
    for share in (0.4, 1.0):
        result = fasp_fx.prune(model, (example,), sparsity=share * most, score="random", restore=None)
        assert_exact(model, result, (unseen,))


def test_a_transposed_convolution_in_groups_is_repaired() -> None:
    model = randomise(MODELS["transposed grouped"](), std=0.4)
    x = torch.randn(270, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    result = fasp_fx.prune(model, (x[:90],), calibration=list(x.chunk(3)), sparsity=0.3, quality="fast")
    cut = fasp_fx.apply(model, result.plan, (x[:90],))
    with torch.no_grad():
        repaired, left = ((one.module(x) - model(x)).norm() for one in (result, cut))
    assert repaired < left


def test_a_grouped_convolution_scores_each_group_by_itself() -> None:
    """Of each group the input channel with the least influence goes, whatever the other groups hold."""
    first, second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4)
    with torch.no_grad():
        for weight in (first.weight, second.weight):
            weight.fill_(1.0)
        second.weight[0:2, 1] = 0.01  # group 0: its second input
        second.weight[2:4, 0] = 0.01  # group 1: its first
        second.weight[4:6, 1] = 0.01
        second.weight[6:8, 0] = 0.01
    model = nn.Sequential(first, second, nn.Conv2d(8, 5, 1)).eval()
    result = fasp_fx.prune(model, (torch.randn(2, 3, 4, 4),), sparsity=0.5, score="magnitude", restore=None)
    (part,) = [part for group in result.plan.groups for part in group.consumers if part.name == "1.weight"]
    assert part.block_dim == 0
    assert part.removed == ((1,), (0,), (1,), (0,))
    assert result.module.get_parameter("1.weight").shape[1] == 1


def over_image(self: Any, x: Tensor) -> Tensor:
    """The weight of a grouped convolution depends on the input; its image is a parameter that stores two of
    three sides as one dimension.
    """
    y = F.conv3d(self.image.view(4, 2, 2, 2), self.weight * x, stride=(1, 2, 2), groups=2)
    return y.movedim(0, -1) @ self.out


def test_no_channel_takes_the_whole_of_one_block_of_an_image() -> None:
    torch.manual_seed(0)
    held = {"image": parameter(4, 4, 2), "weight": parameter(2, 2, 2, 2, 2), "out": parameter(2, 2)}
    model, x = made(over_image, **held).double(), torch.randn((), dtype=torch.float64)
    groups = fasp_fx.analyze(model, (x,)).groups
    assert [str(group) for group in groups if group.status == "prunable"] == [
        "prunable             2  weight[1] -> image[0]"
    ]
    (kept,) = [
        group
        for group in groups
        if any(member.name == "out" and member.dim == 0 for member in group.consumers)
    ]
    assert kept.reason == "layout: they are whole blocks of image[1], which keep equal counts"
    check_program(model, (x,), sparsity=None, invariants=("mask-exact", "steps"))


def computed_kernel(self: Any, x: Tensor, seed: Tensor) -> Tensor:
    """The taps of a kernel are channels elsewhere."""
    kernel = self.make(seed).tanh()
    along = F.conv1d(x, kernel.view(3, 1, 6), groups=3).mean(-1)
    return self.last(along + self.read(kernel))


def test_taps_of_a_kernel_stay_where_they_are_channels_elsewhere() -> None:
    sizes = {"make": (5, 18), "last": (3, 4), "read": (18, 3)}
    model = made(computed_kernel, **{name: nn.Linear(*size) for name, size in sizes.items()})
    groups = fasp_fx.analyze(model, (torch.randn(2, 3, 9), torch.randn(5))).groups
    group = next(group for group in groups if "read.weight" in {part.name for part in group.consumers})
    assert group.status == "frozen"
    assert "positions of a window of aten.conv1d.default" in group.reason


def frequencies(self: Any, x: Tensor) -> Tensor:
    """Convolutions over times and frequencies, laid side by side for each time, as speech models begin."""
    hidden = self.conv(x.unsqueeze(1)).relu().transpose(1, 2)
    return self.out(self.project(hidden.flatten(2)).relu())


@pytest.mark.parametrize("width", [5, 6])
def test_frequencies_that_strides_leave_few_of_are_features(width: int) -> None:
    """As many as the next weight is wide for; times and samples still vary."""
    model = randomise(
        made(
            frequencies,
            conv=nn.Conv2d(1, 5, 3, stride=2, padding=1),
            project=nn.Linear(15, 7),
            out=nn.Linear(7, 2),
        )
    )
    result = fasp_fx.prune(model, (torch.randn(2, 7, width),), sparsity=0.3, score="magnitude", restore=None)
    assert {group.name for group in result.plan.groups} == {"project.weight", "out.weight"}
    assert_exact(model, result, *((torch.randn(2, length, width),) for length in (7, 12, 21)))
    with pytest.raises(fasp_fx.errors.CallError, match=r"of shape \(.*9"):
        result.module(torch.randn(2, 7, 9))


def test_lengths_that_strides_leave_few_of_still_vary() -> None:
    """What a table of positions allows is a length, and no channel is laid out by it."""

    model = made(
        lambda self, x: self.mix((self.conv(x) + self.positions).relu()),
        conv=nn.Conv1d(3, 6, 3, stride=2, padding=1),
        mix=nn.Conv1d(6, 4, 1),
        positions=parameter(1, 6, 4),
    )
    model = randomise(model)
    result = fasp_fx.prune(model, (torch.randn(2, 3, 8),), sparsity=0.3, score="magnitude", restore=None)
    assert_exact(model, result, *((torch.randn(3, 3, length),) for length in (7, 8)))
