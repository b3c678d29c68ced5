"""One call of an operator: its arguments by name, its results, how it prints, and the small choices that it
is made up of.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

from fasp_fx.base import OpOverload, pytree, schema_of

from .._case import copied

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """An operator and its arguments by schema name."""

    operator: OpOverload
    arguments: Mapping[str, Any]

    def with_(self, /, **changed: Any) -> Call:
        """The same call with other arguments, or other tensors of a list (``name.index``)."""
        arguments = dict(self.arguments)
        for name, value in changed.items():
            whole, _, index = name.partition(".")
            arguments[whole] = (
                value
                if not index
                else [value if at == int(index) else item for at, item in enumerate(arguments[whole])]
            )
        return Call(self.operator, arguments)

    def run(self) -> list[Tensor]:
        """The tensors the operator returns, in order.

        Raises:
            Exception: whatever the operator raises.
        """
        with torch.no_grad():
            found = self.operator(**copied(dict(self.arguments)))
        return tensors(found)

    def tensors(self) -> dict[str, Tensor]:
        """The tensor arguments; those of a list are named ``name.index``, as rules name them."""
        found: dict[str, Any] = {}
        for name, value in self.arguments.items():
            listed = isinstance(value, (list, tuple))
            found |= {f"{name}.{at}": item for at, item in enumerate(value)} if listed else {name: value}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @property
    def size(self) -> tuple[int, int, int]:
        """How large a call is, for finding the smallest: elements, dimensions, arguments that are not at
        their default.
        """
        given = self.tensors().values()
        return sum(t.numel() for t in given), sum(t.dim() for t in given), len(self.shown())

    def shown(self) -> dict[str, Any]:
        """The arguments that are not at their default."""
        defaults = {
            argument.name: argument.default_value
            for argument in schema_of(self.operator).arguments
            if argument.has_default_value()
        }
        return {
            name: value
            for name, value in self.arguments.items()
            if isinstance(value, Tensor) or name not in defaults or defaults[name] != value
        }

    def __str__(self) -> str:
        return (
            f"{self.operator}({', '.join(f'{name}={_spell(value)}' for name, value in self.shown().items())})"
        )


def _spell(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "" if value.is_floating_point() else f" {str(value.dtype).removeprefix('torch.')}"
        return f"<{'x'.join(map(str, value.shape)) or 'scalar'}{kind}>"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_spell, value))}]"
    return repr(value)


def tensors(found: Any) -> list[Tensor]:
    """The tensors of an operator's result."""
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def same(first: Tensor, second: Tensor) -> bool:
    """Equal up to rounding, where both are numbers; shapes must agree."""
    alike = first.shape == second.shape and first.dtype == second.dtype
    return alike and bool(close(first, second).all())


def close(first: Tensor, second: Tensor) -> Tensor:
    """Which positions are equal up to rounding: boolean, of their common shape."""
    if not (first.is_floating_point() or first.is_complex()):
        return first == second
    rounding = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4}.get(
        first.dtype, 2e-2
    )
    finite = second[torch.isfinite(second)].abs()
    scale = max(1.0, float(finite.max()) if finite.numel() else 1.0)
    return torch.isclose(first, second, rtol=0.0, atol=rounding * scale, equal_nan=True)


def repeatable(call: Call) -> bool:
    """Whether the operator gives the same result twice; what draws random numbers says nothing."""
    first, second = call.run(), call.run()
    return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))


#: what the numbers in tensors can be; an operator is given the kinds it takes
_NUMBERS: dict[str, Callable[[list[int], Generator], Tensor]] = {
    "real": lambda sizes, source: torch.randn(sizes, generator=source, dtype=torch.float64),
    "unit": lambda sizes, source: torch.rand(sizes, generator=source, dtype=torch.float64) * 0.8 + 0.1,
    "above": lambda sizes, source: torch.rand(sizes, generator=source, dtype=torch.float64) * 2 + 1.1,
    "whole": lambda sizes, source: torch.randint(1, 7, sizes, generator=source),
    "bool": lambda sizes, source: torch.randint(0, 2, sizes, generator=source).bool(),
    "complex": lambda sizes, source: torch.randn(sizes, generator=source, dtype=torch.complex128),
}
KINDS = tuple(_NUMBERS)


class Draw:
    """Random small sizes, flags and tensors.

    Args:
        seed: equal seeds draw equal calls.
        most: no size is larger than this.
        kind: what tensors hold where nothing else is asked for, one of :data:`KINDS`.
    """

    def __init__(self, seed: int, most: int = 4, kind: str = "real") -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.most, self.kind = most, kind

    def integer(self, low: int, high: int) -> int:
        """An integer between both, inclusive."""
        return self.random.randint(low, high)

    def flag(self, likely: float = 0.5) -> bool:
        """Whether something happens."""
        return self.random.random() < likely

    def choice(self, items: Sequence[T]) -> T:
        """One of these."""
        return self.random.choice(items)

    def some(self, items: Sequence[T], least: int = 0) -> list[T]:
        """Some of these, in their order."""
        count = self.integer(min(least, len(items)), len(items))
        return [items[index] for index in sorted(self.random.sample(range(len(items)), count))]

    def order(self, items: Sequence[T]) -> list[T]:
        """All of these in another order."""
        return self.random.sample(list(items), len(items))

    def size(self) -> int:
        """The size of a dimension, rarely 1."""
        return 1 if self.flag(0.08) else self.integer(min(2, self.most), self.most)

    def shape(self, least: int = 1, most: int = 4) -> list[int]:
        """The sizes of a tensor of some rank."""
        return [self.size() for _ in range(self.integer(least, max(least, min(most, self.most))))]

    def dim(self, rank: int) -> int:
        """A dimension, counted from either end."""
        return self.integer(-rank, rank - 1) if rank else 0

    def float(self) -> float:
        """A number away from 0 and 1."""
        return round(self.random.uniform(0.15, 0.85), 3)

    def tensor(self, shape: Sequence[int], kind: str | None = None, below: int = 2) -> Tensor:
        """A tensor of these sizes; ``below`` bounds the numbers of kind ``index``."""
        if kind == "index":
            return torch.randint(0, max(below, 1), list(shape), generator=self.generator)
        return _NUMBERS[kind or self.kind](list(shape), self.generator)

    def like(self, tensor: Tensor) -> Tensor:
        """Other numbers of the same kind as those of a tensor."""
        if tensor.dtype == torch.bool:
            return ~tensor
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor  # indices name positions; they are not perturbed
        noise = torch.rand(tensor.shape, generator=self.generator, dtype=torch.float64)
        return (tensor * (0.5 + noise if tensor.is_complex() else 0.6 + 0.8 * noise)).to(tensor.dtype)
