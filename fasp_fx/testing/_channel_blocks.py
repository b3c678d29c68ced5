"""Blocks over the channels of vectors and sequences (and, where noted, of images)."""

from __future__ import annotations

from dataclasses import dataclass

from ._spec import Block, Shape, after, choice, positive

ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "hardswish", "prelu", "dropout")
NORMS = ("layer", "rms", "plain_rms", "batch", "group", "instance")
JOINS = ("cat", "add", "mul")
MOVES = ("shuffle", "flip", "roll", "pad")
PARTS = ("chunk", "split", "slice", "unbind")
TIES = ("repeat", "pair", "transpose")
GATES = ("separate", "chunk", "glu")


@dataclass(frozen=True, repr=False)
class Linear(Block):
    """A linear layer to ``width`` channels."""

    width: int
    bias: bool = True

    def __post_init__(self) -> None:
        positive(width=self.width)

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "vector", "sequence")
        return shape.wide(self.width)


@dataclass(frozen=True, repr=False)
class Activation(Block):
    """An elementwise function (``prelu`` has a slope per channel, ``dropout`` is inert in evaluation mode);
    any layout.
    """

    kind: str = "relu"

    def __post_init__(self) -> None:
        choice(self.kind, ACTIVATIONS, "kind")

    def result(self, shape: Shape) -> Shape:
        if self.kind == "prelu" and shape.layout == "sequence":
            raise self.refuse(shape, "torch's prelu takes dimension 1 for the channels")
        return shape


@dataclass(frozen=True, repr=False)
class Norm(Block):
    """A normalisation: ``layer``, ``rms`` (``plain_rms`` written out by hand) over vectors and sequences;
    ``batch``, ``group``, ``instance`` over images.

    ``batch`` also takes vectors. ``groups`` belongs to ``group``.
    """

    kind: str = "layer"
    groups: int = 1

    def __post_init__(self) -> None:
        choice(self.kind, NORMS, "kind")
        positive(groups=self.groups)

    def result(self, shape: Shape) -> Shape:
        if self.kind in ("layer", "rms", "plain_rms"):
            self.only(shape, "vector", "sequence")
        elif self.kind == "batch":
            self.only(shape, "vector", "image")
        else:
            self.only(shape, "image")
        if self.kind == "instance" and all(size == 1 for size in shape.sizes):
            raise self.refuse(shape, "there is one position to normalise over")
        if self.kind == "group" and shape.channels % self.groups:
            raise self.refuse(shape, f"{shape.channels} channels do not divide into {self.groups} groups")
        return shape


@dataclass(frozen=True, repr=False)
class Scale(Block):
    """A parameter per channel, multiplied in (layer scale) or, with ``shift``, added; any layout."""

    shift: bool = False

    def result(self, shape: Shape) -> Shape:
        return shape


@dataclass(frozen=True, repr=False)
class Move(Block):
    """Channels in another order: ``shuffle`` in ``groups``, ``flip``, ``roll`` by one, or ``pad`` by one zero
    channel; any layout.
    """

    kind: str = "shuffle"
    groups: int = 2

    def __post_init__(self) -> None:
        choice(self.kind, MOVES, "kind")
        positive(groups=self.groups)

    def result(self, shape: Shape) -> Shape:
        if self.kind == "shuffle" and shape.channels % self.groups:
            raise self.refuse(shape, f"{shape.channels} channels do not divide into {self.groups} groups")
        return shape.wide(shape.channels + 1) if self.kind == "pad" else shape


@dataclass(frozen=True, repr=False)
class Gated(Block):
    """``silu(gate(x)) * up(x)`` to ``width`` channels; ``form``: two ``separate`` weights, one cut by
    ``chunk``, or one through torch's ``glu``.
    """

    width: int
    form: str = "separate"
    bias: bool = False

    def __post_init__(self) -> None:
        positive(width=self.width)
        choice(self.form, GATES, "form")

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "vector", "sequence")
        return shape.wide(self.width)


@dataclass(frozen=True, repr=False)
class Tied(Block):
    """One weight used twice, to ``width`` channels.

    ``repeat``: a square linear layer applied twice, then one to ``width``; ``pair``: two branches through one
    pair of layers with biases of their own; ``transpose``: up with a weight and down with the same weight
    transposed (the channels stay as many as they were).
    """

    width: int
    form: str = "repeat"

    def __post_init__(self) -> None:
        positive(width=self.width)
        choice(self.form, TIES, "form")

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "vector", "sequence")
        return shape if self.form == "transpose" else shape.wide(self.width)


@dataclass(frozen=True, repr=False)
class MixTokens(Block):
    """The other axis: a two-layer perceptron of ``width`` neurons over the tokens, as in MLP-Mixer; fixes the
    number of tokens.
    """

    width: int

    def __post_init__(self) -> None:
        positive(width=self.width)

    def result(self, shape: Shape) -> Shape:
        self.only(shape, "sequence")
        return shape


def joined(block: Block, shape: Shape, parts: list[Shape], join: str) -> Shape:
    """The shape of several parts put together along the channels.

    Raises:
        ArgumentError: they do not fit together.
    """
    first = parts[0]
    if any((part.layout, part.sizes) != (first.layout, first.sizes) for part in parts):
        raise block.refuse(shape, f"its parts have different shapes: {', '.join(map(str, parts))}")
    if join == "cat":
        return first.wide(sum(part.channels for part in parts))
    if any(part.channels != first.channels for part in parts):
        raise block.refuse(
            shape,
            f"parts of {', '.join(str(part.channels) for part in parts)} channels cannot be joined by"
            f" {join!r}",
        )
    return first


@dataclass(frozen=True, repr=False)
class Residual(Block):
    """``x + body(x)``; where the body changes the number of channels, ``x`` goes through a projection of its
    own. Any layout.
    """

    body: tuple[Block, ...]

    def result(self, shape: Shape) -> Shape:
        found = after(self.body, shape)
        if (found.layout, found.sizes) != (shape.layout, shape.sizes):
            raise self.refuse(shape, f"the body leads to {found}")
        return found


@dataclass(frozen=True, repr=False)
class Branches(Block):
    """Several bodies over one input, joined by ``cat`` (DenseNet, inception), ``add`` or ``mul``; an empty
    body is the input itself. Any layout.
    """

    bodies: tuple[tuple[Block, ...], ...]
    join: str = "cat"

    def __post_init__(self) -> None:
        choice(self.join, JOINS, "join")
        positive(bodies=len(self.bodies))

    def result(self, shape: Shape) -> Shape:
        return joined(self, shape, [after(body, shape) for body in self.bodies], self.join)


@dataclass(frozen=True, repr=False)
class Split(Block):
    """The channels cut into equal parts, each through a body of its own, joined again. Any layout.

    ``how``: torch's ``chunk``; ``split`` by a list of sizes, the first of which may be larger; ``slice`` by
    indexing; ``unbind`` of a view.
    """

    bodies: tuple[tuple[Block, ...], ...]
    how: str = "chunk"
    join: str = "cat"

    def __post_init__(self) -> None:
        choice(self.how, PARTS, "how")
        choice(self.join, JOINS, "join")
        positive(bodies=len(self.bodies))

    def sizes(self, shape: Shape) -> list[int]:
        """The channels of each part.

        Raises:
            ArgumentError: there are too few, or they do not divide.
        """
        each, rest = divmod(shape.channels, len(self.bodies))
        if each == 0 or (rest and self.how != "split"):
            raise self.refuse(shape, f"{shape.channels} channels do not divide into {len(self.bodies)} parts")
        return [each + rest, *[each] * (len(self.bodies) - 1)]

    def result(self, shape: Shape) -> Shape:
        return joined(
            self,
            shape,
            [
                after(body, shape.wide(size))
                for body, size in zip(self.bodies, self.sizes(shape), strict=True)
            ],
            self.join,
        )
