"""Models that are odd in how they are called, in what they return, remember and write into, or in what hangs
on them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from models import block, stack, wide
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from . import Entry, Make, entries, rows

X = torch.linspace(-1, 1, 18).reshape(3, 6)
CALLS = ((X,), (2 * X,), (torch.cat([X - 1, X]),))


def with_changes(model: nn.Module, *changes: Callable[[Any], Any]) -> nn.Module:
    for change in changes:
        change(model)
    return model.eval()


def plain() -> nn.Module:
    return wide(block)


def hooked(*changes: Callable[[Any], Any]) -> Make:
    return lambda: with_changes(plain(), *changes)


def run_once(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model(X)
    return model


def _double(*args: Any) -> Any:
    return 2 * args[-1]


def _halve(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] / 2,)


def averages(self: Any, x: Tensor) -> Tensor:
    """A count and a running mean of what it saw."""
    self.count.add_(1)
    self.mean.mul_(0.9).add_(x.mean(0) * 0.1)
    return block(self, x + self.mean) * self.count


def hidden_mean(self: Any, x: Tensor) -> Tensor:
    """A buffer as wide as the hidden layer."""
    hidden = torch.relu(self.up(x))
    self.mean.mul_(0.9).add_(hidden.mean(0) * 0.1)
    return self.down(hidden - self.mean)


def regions(self: Any, x: Tensor) -> Tensor:
    """Regions of gradient, autocast and checkpointing."""
    with torch.no_grad():
        hidden = self.up(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        hidden = torch.relu(hidden)
    return torch.utils.checkpoint.checkpoint(self.down, hidden, use_reentrant=False)


def loops(self: Any, x: Tensor) -> Tensor:
    """A loop of which export makes one operator, beside a layer that can be pruned."""

    def step(count: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return count + 1, self.inside(state).tanh()

    looped = torch._higher_order_ops.while_loop(lambda count, _: count < 3, step, (torch.tensor(0), x))
    return looped[1] + block(self, x)


def _complex(inside: bool) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = self.up(x.to(torch.complex64))
        out = self.down(hidden * hidden)
        return out.real if inside else out

    return wide(
        forward,
        up=nn.Linear(6, 24, dtype=torch.complex64),
        down=nn.Linear(24, 6, dtype=torch.complex64),
    )


class Mode(enum.Enum):
    RELU = 1
    TANH = 2


class Pair(NamedTuple):
    value: Tensor
    extra: Tensor | None


def options(
    self: Any,
    x: Tensor,
    mode: Mode = Mode.RELU,
    scale: float = 2.0,
    function: Any = torch.relu,
    *,
    count: int | None = None,
) -> Tensor:
    hidden = self.up(x) * scale
    return self.down(function(hidden) if mode is Mode.RELU else torch.tanh(hidden))[:count]


def nested(self: Any, data: dict[str, Any]) -> Tensor:
    return block(self, data["x"]) * data.get("k", 1)


def pictures(self: Any, images: list[Tensor]) -> list[Tensor]:
    return [block(self, image) for image in images]


def returning(wrap: Callable[[Tensor], Any]) -> nn.Module:
    return wide(lambda self, x: wrap(block(self, x)))


def lenient(self: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Reads a mask of any kind, each in its own way."""
    hidden = self.up(x).relu()
    masked = hidden.masked_fill(mask[:, None], 0.5) if mask.dtype == torch.bool else hidden + mask[:, None]
    return self.down(masked)


def shifted(self: Any, x: Tensor) -> Tensor:
    """Begins by moving its input, in its place."""
    return self.down(self.mix(self.up(x.sub_(self.shift).mul_(3.0)).tanh()).tanh())


OPTIONS = [(), (Mode.TANH, 3), (Mode.TANH, 3.0), (Mode.RELU, 2.0, torch.sigmoid)]
ALIKE: dict[str, Make] = {
    "lazy, run once": lambda: run_once(stack(nn.LazyLinear(24), nn.ReLU(), nn.LazyLinear(6))),
    "lazy norm, run once": lambda: run_once(
        stack(nn.LazyLinear(24), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(6))
    ),
    "hook after the model": hooked(lambda m: m.register_forward_hook(_double, with_kwargs=True)),
    "hook that is always called": hooked(lambda m: m.register_forward_hook(_double, always_call=True)),
    "hook before the model": hooked(
        lambda m: m.register_forward_pre_hook(lambda m, a, k: ((a[0] / 2,), k), with_kwargs=True)
    ),
    "hooks of the layers": hooked(
        lambda m: m.up.register_forward_hook(_double),
        lambda m: m.down.register_forward_pre_hook(_halve),
    ),
    "hooks of other things": hooked(
        lambda m: m.up.register_full_backward_hook(lambda *_: None),
        lambda m: m.register_state_dict_post_hook(lambda *_: None),
    ),
    "orthogonal": hooked(lambda m: parametrizations.orthogonal(m.up)),
    "weights masked in a hook": lambda: run_once(
        with_changes(plain(), lambda m: prune.random_unstructured(m.up, "weight", 0.3))
    ),
    "eight bits": lambda: wide(
        lambda self, x: F.linear(torch.relu(self.up(x)), self.table.float() * self.scale),
        table=torch.randint(-128, 127, (6, 24), dtype=torch.int8),
        scale=torch.rand(6, 1) / 128,
    ),
    "complex inside": lambda: _complex(True),
    "scales its input": lambda: wide(lambda self, x: block(self, x.mul_(2))),
    "writes into its input": lambda: wide(lambda self, x: x.add_(block(self, x))),
    "returns its input": lambda: wide(lambda self, x: (x, block(self, x))),
    "moves its input": lambda: wide(shifted, mix=nn.Linear(24, 24), shift=torch.ones(())),
    "returns constants": lambda: returning(
        lambda out: {"out": out, "none": None, "n": 3, "text": "text", "nested": [1, (out.sum(),)]}
    ),
    "returns a pair": lambda: returning(lambda out: Pair(out, None)),
    "regions": lambda: wide(regions),
    "a loop": lambda: wide(loops, inside=nn.Linear(6, 6)),
    "returns hidden channels": lambda: wide(lambda self, x: (h := torch.relu(self.up(x)), self.down(h))),
    "returns a weight": lambda: wide(lambda self, x: (self.up.weight, block(self, x))),
}
#: they keep the weights and the type that they have
AS_MADE: dict[str, Any] = {"std": None, "double": False}
COMPLEX = {count: torch.randn(count, 6, dtype=torch.complex64) for count in (4, 40)}

ENTRIES: dict[str, Entry] = {
    **entries(ALIKE, rows(6, 3, 5), **AS_MADE),
    "complex": Entry(lambda: _complex(False), tuple((x,) for x in COMPLEX.values()), **AS_MADE),
    "a buffer of hidden channels": Entry(lambda: wide(hidden_mean, mean=torch.zeros(24)), CALLS, **AS_MADE),
    "running mean": Entry(
        lambda: wide(averages, count=torch.zeros(1), mean=torch.zeros(6)), CALLS, **AS_MADE
    ),
    **{
        f"options {number}": Entry(lambda: wide(options), ((X, *own), (2 * X[:2], *own)), **AS_MADE)
        for number, own in enumerate(OPTIONS)
    },
    "a list": Entry(lambda: wide(pictures), (([X, X[:2]],), ([2 * X, X[:1]],)), **AS_MADE),
    "a dict": Entry(lambda: wide(nested), (({"x": X, "k": 2},), ({"x": X[:2], "k": 2},)), **AS_MADE),
    **{
        f"a mask of {dtype}": Entry(
            lambda: wide(lenient),
            tuple((x, (torch.arange(len(x)) % 2).to(dtype)) for x in (X, X[:2])),
            **AS_MADE,
        )
        for dtype in (torch.bool, torch.int64, torch.float32)
    },
}
