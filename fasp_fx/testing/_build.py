"""From a specification to a module with random weights, and example inputs for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._channels import join
from ._net import Net, Source, Tokens
from ._spec import after, sequence


class Entry(nn.Module):
    """One input: embedded if it is tokens, then through its own blocks."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.embed = self.positions = None
        if isinstance(source, Tokens):
            self.embed = nn.Embedding(source.vocabulary, source.width)
            self.positions = nn.Embedding(4 * source.tokens, source.width) if source.positions else None
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
        last = after(spec.blocks, entry)
        self.heads = nn.ModuleList(sequence(head, last) for head in spec.heads)
        self.channel_dim = entry.channel_dim
        if spec.tied:
            embedding = self.get_submodule("entries.0.embed")
            assert isinstance(embedding, nn.Embedding)
            self.head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
            self.head.weight = embedding.weight

    def run(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        """The outputs for these inputs, however many they are."""
        entered = [entry(given) for entry, given in zip(self.entries, inputs, strict=True)]
        x = self.blocks(join(entered, self.spec.join, self.channel_dim))
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
    first = source.first()
    sizes = {
        "vector": (first.channels,),
        "image": (first.channels, *first.sizes),
        "sequence": (tokens or (first.sizes or (0,))[0], first.channels),
    }
    return torch.randn(batch, *sizes[first.layout], generator=generator)
