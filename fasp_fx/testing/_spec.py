"""What all specifications share: they are data, they print as the code that makes them, and they know the
shape they lead to.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from fasp_fx.errors import ArgumentError

Layout = Literal["vector", "sequence", "image"]


@dataclass(frozen=True, repr=False)
class Spec:
    """A frozen value whose ``repr`` is the expression that makes it; fields that have their default are left
    out.

    Attributes:
        choices: the values that fields of text may have; sizes are at least 1.

    Raises:
        ArgumentError: names the field, and the values it may have.
    """

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            allowed = self.choices.get(field.name, (value,))
            if value not in allowed:
                listed = ", ".join(map(repr, allowed))
                raise ArgumentError(f"{field.name}={value!r} is not known; use one of {listed}")
            sizes = value if isinstance(value, tuple) else (value,)
            if any(type(size) is int and size < 1 for size in sizes):
                raise ArgumentError(f"{field.name}={value!r} must be at least 1")

    def __repr__(self) -> str:
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.default is MISSING or getattr(self, field.name) != field.default
        ]
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

    def kind_of(self, layer: str) -> Any:
        """Torch's layer of this name for as many dimensions as there are sizes, vectors counting as one."""
        return getattr(nn, f"{layer}{max(len(self.sizes), 1)}d")

    def wide(self, channels: int) -> Self:
        """The same shape with another number of channels."""
        return replace(self, channels=channels)

    def __str__(self) -> str:
        sizes = [str(size) for size in self.sizes]
        inner = [str(self.channels), *sizes] if self.layout == "image" else [*sizes, str(self.channels)]
        return f"{self.layout} [batch, {', '.join(inner)}]"


@dataclass(frozen=True, repr=False)
class Block(Spec):
    """One step from a running shape to the next.

    Attributes:
        layouts: those that it can follow.
    """

    layouts: ClassVar[tuple[Layout, ...]] = ("vector", "sequence", "image")

    def result(self, shape: Shape) -> Shape:
        """The shape behind this block.

        Raises:
            ArgumentError: the block cannot follow this shape.
        """
        if shape.layout not in self.layouts:
            raise self.refuse(shape, f"it takes {' or '.join(self.layouts)} input")
        return self.behind(shape)

    def behind(self, shape: Shape) -> Shape:
        """The shape behind this block, after a layout that it can follow; the same if nothing else is
        said.
        """
        return shape

    def module(self, shape: Shape) -> nn.Module:
        """The module of this block behind a shape."""
        raise NotImplementedError(f"{type(self).__name__} has no module")

    def refuse(self, shape: Shape, why: str) -> ArgumentError:
        """The error for a shape that this block cannot follow."""
        return ArgumentError(f"{self!r} cannot follow {shape}: {why}")

    def divided(self, shape: Shape, count: int, what: str) -> Shape:
        """The shape, if its channels divide into so many equal parts."""
        if shape.channels % count:
            raise self.refuse(shape, f"{shape.channels} channels do not divide into {count} {what}")
        return shape


class Assembled(nn.Module):
    """Parameters, buffers and modules by name, and a function of this module and a tensor that computes with
    them.
    """

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: nn.Module | Tensor | None) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def after(blocks: tuple[Block, ...], shape: Shape) -> Shape:
    """The shape behind a sequence of blocks."""
    for block in blocks:
        shape = block.result(shape)
    return shape


def sequence(blocks: tuple[Block, ...], shape: Shape) -> nn.Sequential:
    """The modules of blocks one after another; none are the identity."""
    modules = []
    for block in blocks:
        modules.append(block.module(shape))
        shape = block.result(shape)
    return nn.Sequential(*modules)
