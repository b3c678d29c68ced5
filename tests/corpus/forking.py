"""Models that cannot be captured as a whole: their largest submodules that can are pruned and put back, and
the notes say which of them stay whole, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from models import Vectors, X, made
from torch import Tensor, nn
from torch.nn import functional as F

from . import Args, Entry, Make


class Forks(nn.Module):
    """The second block runs if the first one says so; the outputs are lists whose lengths depend
    on the data.
    """

    def __init__(self, first: nn.Module | None = None, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.out = first or Vectors(), second or Vectors(), nn.Linear(6, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        x = self.first(x) * scale
        if x.sum() < 1e6:
            x = x + self.second(x)
        return {"out": self.out(x), "kept": [row for row in x if row[0] > -10]}


def forking(forward: Callable[..., Tensor], **held: Any) -> Any:
    """A model that goes on through its last submodule if what it has so far says so."""

    def whole(self: Any, x: Tensor) -> Tensor:
        x = forward(self, x)
        return self.other(x) if x.sum() < 1e6 else x

    return made(whole, other=Vectors(), **held)


def pyramid(self: Any, images: list[Tensor]) -> list[Tensor]:
    """A convolutional backbone, and one head that sees each of a pyramid's levels."""
    found = []
    for level in (self.body(image[None]) for image in images):
        while min(level.shape[-2:]) > 4 and level.mean() < 1e6:
            found.append(self.head(level)[0])
            level = F.max_pool2d(level, 2)
    return found


def _pyramid() -> nn.Module:
    layers = (nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1))
    head = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))
    return made(pyramid, body=nn.Sequential(*layers), head=head)


def stages() -> nn.Module:
    """Containers and inner control flow are descended in the order of the calls."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stages[0](x)["kept"][0]
        for block in self.stages[1].values():
            x = block(x)
        return x

    inner: list[Any] = [Forks(), nn.ModuleDict({"a": Vectors(), "b": Vectors()})]
    return forking(forward, stages=nn.ModuleList(inner), unused=Vectors())


def twice() -> nn.Module:
    """A module at two paths is pruned once and put back at both."""
    block = Vectors()
    return made(
        lambda self, x: self.second["again"](self.first(x)) if x.sum() < 1e6 else x,
        first=block,
        second=nn.ModuleDict({"again": block}),
    )


class Counts(Vectors):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return super().forward(x) * self.count


class Sets(Vectors):
    """A forward that leaves something behind."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape[0]
        return super().forward(x)


class Times(Vectors):
    def forward(self, x: Tensor, factor: float) -> Tensor:
        return super().forward(x) * factor


@dataclass
class Box:
    tensor: Tensor


class Unboxes(Vectors):
    def forward(self, box: Box, x: Tensor) -> Tensor:
        return super().forward(box.tensor) + x


def _lends() -> nn.Module:
    """A module shared across the boundary."""
    shared = Vectors()
    return Forks(nn.Sequential(shared, Vectors()), nn.Sequential(Vectors(), shared))


def _refers() -> nn.Module:
    """A reference that the module tree does not know."""
    block = Vectors()
    return forking(lambda self, x: self.references[0](x), block=block, references=[block])


def reading(read: Callable[[Any, Tensor], Tensor]) -> Make:
    """A parent that reads attributes of its child besides calling it."""

    def make() -> nn.Module:
        block: Any = Vectors()
        block.width, block.config = 6, {"scale": 2.0, "names": ["a"]}
        return forking(lambda self, x: read(self.block, self.block(x)), block=block)

    return make


def _sum_of(block: nn.Module, what: Callable[[Tensor], Any]) -> Any:
    return sum(what(parameter) for _, parameter in block.named_parameters())


def moving_mean(self: Any, x: Tensor) -> Tensor:
    """A buffer written outside of the parts, and a list that grows."""
    self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
    self.log.append(len(x))
    return self.counted(x - self.mean)


def uneven() -> nn.Module:
    """The second block cannot lose as much as the first."""
    return made(
        lambda self, x: self.narrow(x) if (x := self.wide(x)).sum() < 1e6 else x,
        wide=nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 6)),
        narrow=nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6)),
    )


#: what makes a model whose parent reads or shares something of a submodule
MODELS: dict[str, Make] = {
    "blocks around a branch": Forks,
    "inner control flow": stages,
    "a module at two paths": twice,
    "parts of uneven widths": uneven,
    "a buffer that is written": lambda: forking(lambda self, x: self.block(x), block=Counts()),
    "a module shared across the boundary": _lends,
    "a weight that is read": reading(lambda block, x: x + block.up.weight.abs().mean()),
    "layers that are called": reading(lambda block, x: block.down(torch.relu(block.up(x)))),
    "values of parameters that are read": reading(
        lambda block, x: x + _sum_of(block, lambda own: own.square().sum())
    ),
    "sizes of parameters that are read": reading(lambda block, x: x * _sum_of(block, Tensor.numel)),
    "a reference": _refers,
    "an attribute that is set": lambda: Forks(Sets()),
    "calls with other constants": (
        lambda: forking(lambda self, x: self.block(self.block(x, 1.0), 2.0), block=Times())
    ),
    "an argument of an unknown class": (
        lambda: forking(lambda self, x: self.block(Box(x), x), block=Unboxes())
    ),
    "numbers that are read": reading(lambda block, x: x * block.width + block.config["scale"]),
    "a type that is read": reading(lambda block, x: x.to(next(block.parameters()).dtype)),
    "a method that is called": reading(lambda block, x: x + block.forward(x)),
    "a moving mean": lambda: forking(moving_mean, counted=Vectors(), mean=torch.full((6,), 0.5), log=[]),
}
CALLS: tuple[Args, ...] = ((X,), (2 * X,), (X[:2],), (X - 1,))
IMAGES = [torch.rand(3, 20, 24), torch.rand(3, 16, 16), torch.rand(3, 36, 18)]

ENTRIES: dict[str, Entry] = {
    **{name: Entry(make, CALLS, std=None, double=False) for name, make in MODELS.items()},
    "blocks around a branch, scaled": Entry(Forks, (*CALLS, (X, 2.0)), std=None, double=False),
    "a pyramid": Entry(_pyramid, ((IMAGES[:2],), (IMAGES,), (IMAGES[:1],)), std=None, double=False),
}
