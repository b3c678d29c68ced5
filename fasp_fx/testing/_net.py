"""Inputs, and whole nets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar

from fasp_fx.errors import ArgumentError

from ._channels import JOINS, joined
from ._spec import Block, Shape, Spec, after


@dataclass(frozen=True, repr=False)
class Source(Spec):
    """One input, and the blocks it goes through before it meets the others."""

    def first(self) -> Shape:
        """The shape of the input (for tokens: of their embeddings)."""
        raise NotImplementedError

    def shape(self) -> Shape:
        """The shape in which it meets the others."""
        return after(getattr(self, "blocks", ()), self.first())


@dataclass(frozen=True, repr=False)
class Vectors(Source):
    """An input of shape ``[batch, width]``."""

    width: int = 2
    blocks: tuple[Block, ...] = ()

    def first(self) -> Shape:
        return Shape("vector", self.width)


@dataclass(frozen=True, repr=False)
class Sequences(Source):
    """An input of shape ``[batch, tokens, width]``."""

    width: int = 2
    tokens: int = 3
    blocks: tuple[Block, ...] = ()

    def first(self) -> Shape:
        return Shape("sequence", self.width, (self.tokens,))


@dataclass(frozen=True, repr=False)
class Images(Source):
    """An input of shape ``[batch, channels, *sizes]`` with one or two sizes."""

    channels: int = 2
    sizes: tuple[int, ...] = (4,)
    blocks: tuple[Block, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sizes) not in (1, 2):
            raise ArgumentError(f"sizes={self.sizes!r} must hold one or two sizes")

    def first(self) -> Shape:
        return Shape("image", self.channels, self.sizes)


@dataclass(frozen=True, repr=False)
class Tokens(Source):
    """Integers below ``vocabulary`` of shape ``[batch, tokens]``, embedded in ``width`` channels;
    ``positions`` adds a learned table.
    """

    vocabulary: int = 5
    width: int = 2
    tokens: int = 3
    positions: bool = False
    blocks: tuple[Block, ...] = ()

    def first(self) -> Shape:
        return Shape("sequence", self.width, (self.tokens,))


@dataclass(frozen=True, repr=False)
class Net(Spec):
    """A model: its inputs joined (by ``cat``, ``add`` or ``mul``), then blocks, then heads.

    Attributes:
        blocks: what the joined inputs go through.
        inputs: one to three inputs.
        join: how several inputs are joined.
        heads: the blocks of each of several outputs; without any, there is one output: what the blocks lead
            to.
        named: whether several outputs come as a dict rather than a tuple.
        tied: whether a last layer over the vocabulary shares the embedding's weight (the only input is then
            tokens).
    """

    blocks: tuple[Block, ...]
    inputs: tuple[Source, ...] = (Vectors(),)
    join: str = "add"
    heads: tuple[tuple[Block, ...], ...] = ()
    named: bool = False
    tied: bool = False
    choices: ClassVar = {"join": JOINS}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.inputs) <= 3:
            raise ArgumentError(f"a net has one to three inputs, not {len(self.inputs)}")
        self.shapes()

    def entry(self) -> Shape:
        """The shape of the joined inputs.

        Raises:
            ArgumentError: they do not fit together.
        """
        found = joined([source.shape() for source in self.inputs], self.join)
        if isinstance(found, str):
            raise ArgumentError(f"inputs {found}")
        return found

    def shapes(self) -> list[Shape]:
        """The shapes of the outputs.

        Raises:
            ArgumentError: a block cannot follow the shape before it.
        """
        last = after(self.blocks, self.entry())
        if not self.tied:
            return [after(head, last) for head in self.heads] or [last]
        source, *others = self.inputs
        alone = not others and not self.heads and last.layout != "image"
        if not alone or not isinstance(source, Tokens) or source.width != last.channels:
            raise ArgumentError(
                "tied=True needs a single input of tokens, a single output, and as many channels at the end"
                " as the embedding has"
            )
        return [last.wide(source.vocabulary)]


def blocks_of(value: object) -> Iterator[Block]:
    """Every block of a specification, outer ones first."""
    if isinstance(value, Block):
        yield value
    if isinstance(value, Spec):
        value = tuple(getattr(value, field.name) for field in fields(value))
    for item in value if isinstance(value, tuple) else ():
        yield from blocks_of(item)
