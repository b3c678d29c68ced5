"""From a specification to a module with random weights, and example inputs for it."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor, nn

from . import _channel_modules as channel
from . import _image_modules as image
from ._channel_blocks import (
    Activation,
    Branches,
    Gated,
    Linear,
    MixTokens,
    Move,
    Norm,
    Residual,
    Scale,
    Split,
    Tied,
)
from ._image_blocks import Collapse, Conv, Pool, Resize, SqueezeExcite
from ._large_blocks import Attention, Experts
from ._large_modules import AttentionModule, ExpertsModule
from ._net import Images, Net, Sequences, Source, Tokens, Vectors
from ._odd_blocks import Odd
from ._odd_modules import odd
from ._spec import Block, Shape


@singledispatch
def module_of(block: Block, shape: Shape) -> nn.Module:
    """The module of one block behind a shape."""
    raise TypeError(f"{type(block).__name__} has no module")


@module_of.register
def _(block: Linear, shape: Shape) -> nn.Module:
    return nn.Linear(shape.channels, block.width, block.bias)


@module_of.register
def _(block: Activation, shape: Shape) -> nn.Module:
    return channel.activation(block, shape)


@module_of.register
def _(block: Norm, shape: Shape) -> nn.Module:
    return channel.norm(block, shape)


@module_of.register
def _(block: Scale, shape: Shape) -> nn.Module:
    return channel.ScaleChannels(shape, block.shift)


@module_of.register
def _(block: Move, shape: Shape) -> nn.Module:
    return channel.MoveChannels(block.kind, block.groups, shape.channel_dim)


@module_of.register
def _(block: Gated, shape: Shape) -> nn.Module:
    return channel.GatedLayer(block, shape.channels)


@module_of.register
def _(block: Tied, shape: Shape) -> nn.Module:
    return channel.TiedLayers(block.form, shape.channels, block.width)


@module_of.register
def _(block: MixTokens, shape: Shape) -> nn.Module:
    return channel.TokenMixer(shape.sizes[0], block.width)


@module_of.register
def _(block: Residual, shape: Shape) -> nn.Module:
    wide = block.result(shape).channels
    shortcut = None if wide == shape.channels else projection(shape, wide)
    return channel.ResidualModule(sequence(block.body, shape), shortcut)


@module_of.register
def _(block: Branches, shape: Shape) -> nn.Module:
    return channel.BranchesModule(
        [sequence(body, shape) for body in block.bodies], block.join, shape.channel_dim
    )


@module_of.register
def _(block: Split, shape: Shape) -> nn.Module:
    sizes = block.sizes(shape)
    bodies = [sequence(body, shape.wide(size)) for body, size in zip(block.bodies, sizes, strict=True)]
    return channel.SplitModule(bodies, sizes, block.how, block.join, shape.channel_dim)


@module_of.register
def _(block: Conv, shape: Shape) -> nn.Module:
    return image.conv(block, shape)


@module_of.register
def _(block: Pool, shape: Shape) -> nn.Module:
    return image.pool(block, shape)


@module_of.register
def _(block: Resize, shape: Shape) -> nn.Module:
    return image.resize(block)


@module_of.register
def _(block: SqueezeExcite, shape: Shape) -> nn.Module:
    return image.SqueezeExciteModule(shape.channels, block.width, len(shape.sizes))


@module_of.register
def _(block: Collapse, shape: Shape) -> nn.Module:
    return image.CollapseModule(block.kind, shape)


@module_of.register
def _(block: Attention, shape: Shape) -> nn.Module:
    return AttentionModule(block, shape.channels)


@module_of.register
def _(block: Experts, shape: Shape) -> nn.Module:
    return ExpertsModule(block, shape.channels)


@module_of.register
def _(block: Odd, shape: Shape) -> nn.Module:
    return odd(block, shape)


def projection(shape: Shape, channels: int) -> nn.Module:
    """A linear layer, or for images a convolution of one position."""
    if shape.layout == "image":
        return (nn.Conv2d if len(shape.sizes) == 2 else nn.Conv1d)(shape.channels, channels, 1, bias=False)
    return nn.Linear(shape.channels, channels, bias=False)


def sequence(blocks: tuple[Block, ...], shape: Shape) -> nn.Sequential:
    """The modules of blocks one after another; none are the identity."""
    modules = []
    for block in blocks:
        modules.append(module_of(block, shape))
        shape = block.result(shape)
    return nn.Sequential(*modules)


class Entry(nn.Module):
    """One input: embedded if it is tokens, then through its own blocks."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.embed = nn.Embedding(source.vocabulary, source.width) if isinstance(source, Tokens) else None
        self.positions = (
            nn.Embedding(4 * source.tokens, source.width)
            if isinstance(source, Tokens) and source.positions
            else None
        )
        self.blocks = sequence(getattr(source, "blocks", ()), source.first())

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        if self.positions is not None:
            x = x + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.blocks(x)


class NetModule(nn.Module):
    """The module of a net with one input."""

    def __init__(self, spec: Net) -> None:
        super().__init__()
        self.spec = spec
        self.entries = nn.ModuleList(Entry(source) for source in spec.inputs)
        entry = spec.entry()
        self.blocks = sequence(spec.blocks, entry)
        last = entry
        for block in spec.blocks:
            last = block.result(last)
        self.heads = nn.ModuleList(sequence(head, last) for head in spec.heads)
        self.channel_dim = entry.channel_dim
        if spec.tied:
            (source,) = spec.inputs
            assert isinstance(source, Tokens)
            self.head = nn.Linear(source.width, source.vocabulary, bias=False)
            embedding = self.get_submodule("entries.0.embed")
            assert isinstance(embedding, nn.Embedding)
            self.head.weight = embedding.weight

    def run(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        """The outputs for these inputs, however many they are."""
        x = self.blocks(
            channel.join(
                [entry(given) for entry, given in zip(self.entries, inputs, strict=True)],
                self.spec.join,
                self.channel_dim,
            )
        )
        if self.spec.tied:
            return self.head(x)
        found = tuple(head(x) for head in self.heads)
        if not found:
            return x
        return {f"output_{index}": output for index, output in enumerate(found)} if self.spec.named else found

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
    """
    kind = (NetModule, TwoInputs, ThreeInputs)[len(spec.inputs) - 1]
    return randomise(kind(spec), seed).to(dtype).eval()


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
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        _input(source, batch, tokens, generator).to(torch.long if isinstance(source, Tokens) else dtype)
        for source in spec.inputs
    )


def _input(source: Source, batch: int, tokens: int | None, generator: torch.Generator) -> Tensor:
    if isinstance(source, Tokens):
        return torch.randint(0, source.vocabulary, (batch, tokens or source.tokens), generator=generator)
    if isinstance(source, Images):
        return torch.randn(batch, source.channels, *source.sizes, generator=generator)
    if isinstance(source, Sequences):
        return torch.randn(batch, tokens or source.tokens, source.width, generator=generator)
    assert isinstance(source, Vectors)
    return torch.randn(batch, source.width, generator=generator)
