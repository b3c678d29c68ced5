"""Model zoos, which the coverage benchmark runs over: entries that say how to build a model and what to call
it with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn

#: size of every vocabulary, and the first token number that no configuration gives a special meaning
VOCABULARY, FIRST_TOKEN = 100, 5

#: draws one argument of a call for a batch size
Draw = Callable[[int, Generator], Any]


def ids(tokens: int = 8, top: int = VOCABULARY, low: int = FIRST_TOKEN) -> Draw:
    """Token numbers ``[batch, tokens]`` in ``[low, top)``."""
    return lambda batch, generator: torch.randint(low, top, (batch, tokens), generator=generator)


def noise(*shape: int) -> Draw:
    """Normal values ``[batch, *shape]``."""
    return lambda batch, generator: torch.randn(batch, *shape, generator=generator)


def image(size: int = 32, channels: int = 3) -> Draw:
    """An image ``[batch, channels, size, size]``."""
    return noise(channels, size, size)


def ones(*shape: int, dtype: torch.dtype = torch.long) -> Draw:
    """Ones ``[batch, *shape]``: masks."""
    return lambda batch, generator: torch.ones(batch, *shape, dtype=dtype)


def rows(values: Any, dtype: torch.dtype = torch.long) -> Draw:
    """The same values for every element of the batch, ``[batch, *shape]``."""
    return lambda batch, generator: (
        torch.tensor(values, dtype=dtype).expand(batch, *torch.tensor(values).shape).clone()
    )


def constant(value: Any) -> Draw:
    """A value that does not depend on the batch size."""
    return lambda batch, generator: value


def per_item(draw: Callable[[Generator], Tensor]) -> Draw:
    """Packed inputs without a batch dimension: ``draw`` once per element, concatenated along the first
    dimension.
    """
    return lambda batch, generator: torch.cat([draw(generator) for _ in range(batch)])


@dataclass(frozen=True)
class Entry:
    """One model of a zoo.

    Attributes:
        name: unique within its zoo.
        kind: the family that the tables group it under.
        make: builds it, in any mode, with any weights.
        positional: draws of the positional arguments.
        keywords: draws of the keyword arguments.
        double: measured in float64, because a rounding error can change a route.
        batches: the batch size at capture and an unseen one; equal where the model allows only one.
    """

    name: str
    kind: str
    make: Callable[[], nn.Module]
    positional: tuple[Draw, ...] = ()
    keywords: Mapping[str, Draw] = field(default_factory=dict)
    double: bool = False
    batches: tuple[int, int] = (2, 3)

    def inputs(self, batch: int, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for one call; equal seeds give equal values."""
        generator = torch.Generator().manual_seed(seed)
        args = tuple(draw(batch, generator) for draw in self.positional)
        kwargs = {name: draw(batch, generator) for name, draw in self.keywords.items()}
        return (self._cast(args), self._cast(kwargs))

    def _cast(self, value: Any) -> Any:
        def cast(leaf: Any) -> Any:
            widened = self.double and isinstance(leaf, Tensor) and leaf.is_floating_point()
            return leaf.double() if widened else leaf

        return torch.utils._pytree.tree_map(cast, value)
