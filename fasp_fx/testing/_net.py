"""Inputs and whole nets; the module of a net with random weights, and example inputs for it."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fasp_fx.errors import ArgumentError

from ._channels import JOINS, join, joined
from ._spec import Assembled, Block, Shape, Spec, after, sequence


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
        shape = joined([source.shape() for source in self.inputs], self.join)
        if isinstance(shape, str):
            raise ArgumentError(f"inputs {shape}")
        return shape

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


def _entry(source: Source) -> nn.Module:
    """One input: embedded if it is tokens, then through its own blocks."""
    parts: dict[str, nn.Module | None] = {"embed": None, "positions": None}
    if isinstance(source, Tokens):
        parts["embed"] = nn.Embedding(source.vocabulary, source.width)
        parts["positions"] = nn.Embedding(4 * source.tokens, source.width) if source.positions else None
    return Assembled(_entered, **parts, blocks=sequence(getattr(source, "blocks", ()), source.first()))


def _entered(m: Any, x: Tensor) -> Tensor:
    if m.embed is not None:
        x = m.embed(x)
    if m.positions is not None:
        x = x + m.positions(torch.arange(x.shape[1], device=x.device))
    return m.blocks(x)


class NetModule(nn.Module):
    """The module of a net with one input."""

    def __init__(self, spec: Net) -> None:
        super().__init__()
        self.spec = spec
        self.entries = nn.ModuleList(_entry(source) for source in spec.inputs)
        entry = spec.entry()
        self.blocks, last = sequence(spec.blocks, entry), after(spec.blocks, entry)
        self.heads = nn.ModuleList(sequence(head, last) for head in spec.heads)
        self.channel_dim = entry.channel_dim
        if spec.tied:
            embedding = self.get_submodule("entries.0.embed")
            assert isinstance(embedding, nn.Embedding)
            self.head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
            self.head.weight = embedding.weight

    def run(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        """The outputs for these inputs, however many they are."""
        entered = [entry(value) for entry, value in zip(self.entries, inputs, strict=True)]
        x = self.blocks(join(entered, self.spec.join, self.channel_dim))
        if self.spec.tied:
            return self.head(x)
        outputs = tuple(head(x) for head in self.heads)
        if self.spec.named and outputs:
            return {f"output_{index}": output for index, output in enumerate(outputs)}
        return outputs or x

    def forward(self, first: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        return self.run(first)


class TwoInputs(NetModule):
    """The module of a net with two inputs."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:  # type: ignore[override]
        return self.run(first, second)


class ThreeInputs(NetModule):
    """The module of a net with three inputs."""

    def forward(  # type: ignore[override]
        self, first: Tensor, second: Tensor, third: Tensor
    ) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        return self.run(first, second, third)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every weight anew so that every channel shows in the output: matrices keep the size of what goes
    through, biases and scales are far from 0 and 1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            if parameter.dim() > 1:
                parameter.copy_(noise * 1.2 / _fan_in(parameter) ** 0.5)
            else:
                parameter.copy_(1 + noise * 0.3 if is_scale else noise * 0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.5)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module


def _fan_in(weight: Tensor) -> float:
    """How many inputs each output of a weight adds up; of three dimensions the middle one counts (stacked
    experts, convolutions of one dimension).
    """
    return weight.shape[1] if weight.dim() == 3 else weight.numel() / weight.shape[0]


def build(spec: Net, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The module of a specification, in evaluation mode, with random weights large enough that every channel
    shows in the output.

    Equal specifications, seeds and types give equal weights. ``forward`` names its inputs ``first``,
    ``second`` and ``third``.

    Examples:
        >>> from fasp_fx.testing import build, example
        >>> from fasp_fx.testing.specs import Linear, Net
        >>> net = Net(blocks=(Linear(width=6), Linear(width=2)))
        >>> build(net, seed=0)(*example(net)).shape[-1]
        2
    """
    return randomise((NetModule, TwoInputs, ThreeInputs)[len(spec.inputs) - 1](spec), seed).to(dtype).eval()


def example(
    spec: Net, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32, tokens: int | None = None
) -> tuple[Tensor, ...]:
    """Random inputs of a net, as positional arguments.

    Args:
        spec: the net.
        batch: the first dimension of each input.
        seed: equal seeds give equal inputs.
        dtype: the type of inputs that are not tokens.
        tokens: another length for sequences and tokens, where the net allows it.

    Examples:
        >>> from fasp_fx.testing import example
        >>> from fasp_fx.testing.specs import Linear, Net
        >>> [tuple(value.shape) for value in example(Net(blocks=(Linear(width=2),)), batch=3)]
        [(3, 2)]
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        _input(source, batch, tokens, generator).to(torch.long if isinstance(source, Tokens) else dtype)
        for source in spec.inputs
    )


def _input(source: Source, batch: int, tokens: int | None, generator: torch.Generator) -> Tensor:
    if isinstance(source, Tokens):
        return torch.randint(0, source.vocabulary, (batch, tokens or source.tokens), generator=generator)
    first = source.first()
    sizes = {
        "vector": (first.channels,),
        "image": (first.channels, *first.sizes),
        "sequence": (tokens or (first.sizes or (0,))[0], first.channels),
    }
    return torch.randn(batch, *sizes[first.layout], generator=generator)
