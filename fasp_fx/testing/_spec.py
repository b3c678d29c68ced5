"""What all specifications share: they are data, they print as the code that makes them, and they know the
shape they lead to.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from typing import Literal

from fasp_fx.errors import ArgumentError

Layout = Literal["vector", "sequence", "image"]


@dataclass(frozen=True, repr=False)
class Spec:
    """A frozen value whose ``repr`` is the expression that makes it; fields that have their default are left
    out.
    """

    def __repr__(self) -> str:
        shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is MISSING or value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True)
class Shape:
    """The running shape between blocks, without the batch.

    Attributes:
        layout: ``vector`` is ``[batch, channels]``, ``sequence`` is ``[batch, tokens, channels]``, ``image``
            is ``[batch, channels, *sizes]``.
        channels: the number of channels.
        sizes: the tokens, or the height and width (one or two sizes); empty for vectors.
    """

    layout: Layout
    channels: int
    sizes: tuple[int, ...] = ()

    @property
    def channel_dim(self) -> int:
        """The dimension that holds the channels."""
        return 1 if self.layout == "image" else -1

    def wide(self, channels: int) -> Shape:
        """The same shape with another number of channels."""
        return replace(self, channels=channels)

    def __str__(self) -> str:
        sizes = [str(size) for size in self.sizes]
        inner = [str(self.channels), *sizes] if self.layout == "image" else [*sizes, str(self.channels)]
        return f"{self.layout} [batch, {', '.join(inner)}]"


@dataclass(frozen=True, repr=False)
class Block(Spec):
    """One step from a running shape to the next."""

    def result(self, shape: Shape) -> Shape:
        """The shape behind this block.

        Raises:
            ArgumentError: the block cannot follow this shape.
        """
        raise NotImplementedError

    def refuse(self, shape: Shape, why: str) -> ArgumentError:
        """The error for a shape that this block cannot follow."""
        return ArgumentError(f"{self!r} cannot follow {shape}: {why}")

    def only(self, shape: Shape, *layouts: Layout) -> None:
        """Refuse any other layout."""
        if shape.layout not in layouts:
            raise self.refuse(shape, f"it takes {' or '.join(layouts)} input")


def choice(value: str, allowed: tuple[str, ...], name: str) -> None:
    """Refuse a value that is not one of the allowed ones.

    Raises:
        ArgumentError: names the field and the values it may have.
    """
    if value not in allowed:
        raise ArgumentError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, allowed))}")


def positive(**values: int) -> None:
    """Refuse sizes below one.

    Raises:
        ArgumentError: names the field.
    """
    for name, value in values.items():
        if value < 1:
            raise ArgumentError(f"{name}={value!r} must be at least 1")


def after(blocks: tuple[Block, ...], shape: Shape) -> Shape:
    """The shape behind a sequence of blocks."""
    for block in blocks:
        shape = block.result(shape)
    return shape
