"""Models as data: each is one entry of a table, and every entry gets all the runs of
``tests/test_corpus.py``.

What a run finds of an entry (its groups, what is remarked, which calls are refused) is written into
``tests/golden/corpus``, a line each: that is what is expected of it. ``FASP_FX_REGENERATE=1`` writes it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from models import randomise
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Make = Callable[[], nn.Module]
Args = tuple[Any, ...]
Call = tuple[Args, dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        make: makes it; its weights are drawn anew afterwards, with ``std``, unless that is ``None``.
        calls: positional arguments, or one mapping of keywords; the first are the example.
        options: granularity and groups to include, as for :func:`fasp_fx.analyze`.
        double: it computes in float64, and so what it is called with.
        reference: makes the dense model without what a plan takes, where that is more than zeros in weights.
        masking: how zeros are put into weights (tests/oracle.py).
        invariants: of :mod:`fasp_fx.testing`, which are held of it besides.
        times: how often each call is repeated, where a model remembers its calls.
        since: the release of torch that exports it first.
        slow: runs in the slow profile only, since others differ little from it.
    """

    make: Make
    calls: tuple[Args, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    std: float | None = 0.5
    double: bool = True
    reference: Callable[..., nn.Module] | None = None
    masking: Mapping[str, bool] = field(default_factory=dict)
    invariants: tuple[str, ...] = ()
    times: int = 1
    since: str = "2"
    slow: bool = False

    def build(self) -> nn.Module:
        """The model; equal each time."""
        torch.manual_seed(0)
        model = self.make().eval()
        if self.std is not None:
            randomise(model, std=self.std)
        return model.double() if self.double else model

    def inputs(self) -> list[Call]:
        """Its calls, of its type."""
        dtype = torch.float64 if self.double else torch.float32

        def typed(leaf: Any) -> Any:
            return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        calls = [pytree.tree_map(typed, call) for call in self.calls]
        return [((), call[0]) if _is_keywords(call) else (call, {}) for call in calls]


def _is_keywords(call: Args) -> bool:
    return len(call) == 1 and isinstance(call[0], Keywords)


class Keywords(dict[str, Any]):
    """Arguments by their names."""


pytree.register_pytree_node(
    Keywords,
    lambda own: ([*own.values()], [*own]),
    lambda values, names: Keywords(zip(names, values, strict=True)),
)


def drawn(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Random arguments of these shapes."""
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def rows(width: int, *counts: int) -> tuple[Args, ...]:
    """Calls of a model of vectors."""
    return tuple(drawn((count, width)) for count in counts or (4, 7))


def sequences(width: int, *sizes: tuple[int, int]) -> tuple[Args, ...]:
    """Calls of a model of sequences: another batch and another length than the example's, shorter and
    longer.
    """
    return tuple(drawn((*size, width)) for size in sizes or ((2, 6), (3, 7), (5, 4)))


def images(channels: int, *sizes: tuple[int, ...]) -> tuple[Args, ...]:
    """Calls of a model of images."""
    return tuple(drawn((batch, channels, *size)) for batch, *size in sizes or ((2, 12, 12), (3, 12, 12)))


def entries(makes: Mapping[str, Make], calls: tuple[Args, ...], **fields: Any) -> dict[str, Entry]:
    """One entry for each of some models that are called alike."""
    return {name: Entry(make, calls, **fields) for name, make in makes.items()}
