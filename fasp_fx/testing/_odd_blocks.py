"""Blocks in which channels lie where a reader, or an analysis, may not expect them. Each leads to the shape
that it follows.
"""

from __future__ import annotations

from dataclasses import dataclass

from ._spec import Block, Shape, choice, positive

ACROSS = (
    "roll",
    "flip",
    "cumsum",
    "cumprod",
    "cummax",
    "logcumsumexp",
    "sort",
    "argsort",
    "fourier",
    "softmax",
)
REGROUPS = ("heads", "turned", "batch", "rows", "chunk", "flatten", "crosswise")
MEMORIES = ("order", "beside", "blocks", "counter", "trace")
FOREIGN = ("number", "pair", "several", "fill")
SIZED = ("pad", "slice", "blocks", "last", "end", "time", "select", "spread")
REUSES = ("autoencoder", "columns", "rows", "square", "gram")
PICKS = ("gather", "largest", "table", "unbind", "one_by_one", "permuted", "twice", "computed", "chosen")
FUSED = (
    "whole",
    "stacked",
    "turned",
    "flat",
    "windows",
    "batch",
    "across",
    "cut",
    "half",
    "shifted",
    "backwards",
)


@dataclass(frozen=True, repr=False)
class Odd(Block):
    """What all of these share."""


@dataclass(frozen=True, repr=False)
class Across(Odd):
    """The channels in ``blocks``, and an operator that goes across them: the same position of every block
    meets. Any layout.
    """

    kind: str = "roll"
    blocks: int = 2

    def __post_init__(self) -> None:
        choice(self.kind, ACROSS, "kind")
        positive(blocks=self.blocks)

    def result(self, shape: Shape) -> Shape:
        return _divided(self, shape, self.blocks)


@dataclass(frozen=True, repr=False)
class Regroup(Odd):
    """A reshape that reads tokens and channels in another order than they lie in, and one back.

    ``heads`` (in ``blocks``) without the transpose that should precede it; ``turned`` and read as before;
    ``batch`` in the place of channels; ``rows`` of as many channels, each with a scale; halves of the
    flattened sequence exchanged (``chunk``); ``flatten`` and back, which moves nothing; repeated as often as
    there are tokens and read ``crosswise``.
    """

    kind: str = "heads"
    blocks: int = 2

    def __post_init__(self) -> None:
        choice(self.kind, REGROUPS, "kind")
        positive(blocks=self.blocks)

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "sequence")
        return _divided(self, shape, self.blocks if self.kind == "heads" else 1)


@dataclass(frozen=True, repr=False)
class Remember(Odd):
    """A buffer that every call writes.

    The ``order`` of the channels (also ``beside`` them as they were) or of the ``blocks`` that they come in,
    a ``counter``, the ``trace`` of their means.
    """

    kind: str = "order"
    blocks: int = 2

    def __post_init__(self) -> None:
        choice(self.kind, MEMORIES, "kind")
        positive(blocks=self.blocks)

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "vector", "sequence")
        return _divided(self, shape, self.blocks if self.kind == "blocks" else 1)


@dataclass(frozen=True, repr=False)
class Foreign(Odd):
    """A custom operator that nobody has described, with any return.

    It gives a ``number``; a ``pair`` of a number and a tensor; ``several`` tensors in a list and one more; or
    nothing, and does ``fill`` an argument. Any layout.
    """

    kind: str = "pair"

    def __post_init__(self) -> None:
        choice(self.kind, FOREIGN, "kind")

    def result(self, shape: Shape) -> Shape:
        return shape


@dataclass(frozen=True, repr=False)
class Sized(Odd):
    """The number of tokens used as a number.

    It says which channel to ``select``, how far to ``pad``, where to ``slice``, how many of the ``blocks`` to
    take, what is the ``last`` element or the ``end`` of the flattened sequence, where the halves in ``time``
    meet; or each token's part of it is ``spread`` over the channels.
    """

    kind: str = "pad"
    blocks: int = 2

    def __post_init__(self) -> None:
        choice(self.kind, SIZED, "kind")
        positive(blocks=self.blocks)

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "sequence")
        if self.kind == "select" and shape.sizes[0] > shape.channels:
            raise self.refuse(shape, "there are more tokens than channels")
        return _divided(self, shape, self.blocks if self.kind == "blocks" else 1)


@dataclass(frozen=True, repr=False)
class Reuse(Odd):
    """One weight read in two ways, with ``width`` channels in between.

    ``autoencoder``: up, and down by the transposed weight; weights whose ``columns`` or ``rows`` are
    normalised in every call; a ``square`` one applied twice, the second time transposed; ``gram``: times the
    weight's products with itself.
    """

    width: int
    kind: str = "autoencoder"

    def __post_init__(self) -> None:
        positive(width=self.width)
        choice(self.kind, REUSES, "kind")

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "vector", "sequence")
        return shape


@dataclass(frozen=True, repr=False)
class Pick(Odd):
    """Positions that indices name.

    Of channels: ``gather`` the largest of each vector, take that which is ``largest`` in the first one, or
    look its position up in a ``table``. Of a stack of three two-layer weights with ``width`` neurons: all by
    ``unbind`` or ``one_by_one``; the second layers ``permuted``, one ``twice``, in a ``computed`` order, or
    one ``chosen`` by the input.
    """

    width: int
    kind: str = "gather"

    def __post_init__(self) -> None:
        positive(width=self.width)
        choice(self.kind, PICKS, "kind")

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "vector", "sequence")
        return shape


@dataclass(frozen=True, repr=False)
class Fused(Odd):
    """Attention of ``heads`` of ``width`` channels, with queries, keys and values in one weight, whose tokens
    are moved before the three are taken apart.

    They stay where they are in the ``whole`` sequence, where the three are ``stacked`` before the heads,
    where tokens are ``turned`` to the front, or made ``flat`` with the samples and put back. They come in
    ``windows`` of three, in windows that join the ``batch``, or go ``across`` windows. The last quarter is
    ``cut`` off, or the second ``half``; they are ``shifted`` by a quarter, or go ``backwards``.
    """

    width: int
    kind: str = "whole"
    heads: int = 2

    def __post_init__(self) -> None:
        positive(width=self.width, heads=self.heads)
        choice(self.kind, FUSED, "kind")

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "sequence")
        return shape


def _divided(block: Block, shape: Shape, blocks: int) -> Shape:
    if shape.channels % blocks:
        raise block.refuse(shape, f"{shape.channels} channels do not divide into {blocks} blocks")
    return shape
