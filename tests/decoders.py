"""Small decoders in plain torch, made to a specification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import randomise

from fasp_fx.testing.specs import Attention, Shape

VOCABULARY = 11


@dataclass(frozen=True)
class Spec:
    """A decoder. ``repeat`` query heads share each of ``kv_heads`` key and value heads; the other fields of
    attention are those of :class:`fasp_fx.testing.specs.Attention`.
    """

    layers: int = 1
    hidden: int = 4
    kv_heads: int = 1
    repeat: int = 1
    head_dim: int = 2
    ffn: int = 4
    bias: bool = False
    gated: bool = False
    fused_gate: bool = False
    positions: str = "none"
    projection: str = "separate"
    attention: str = "sdpa"


class FeedForward(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        if spec.gated and not spec.fused_gate:
            self.gate = nn.Linear(spec.hidden, spec.ffn, bias=spec.bias)
        self.up = nn.Linear(spec.hidden, spec.ffn * (2 if spec.fused_gate else 1), bias=spec.bias)
        self.down = nn.Linear(spec.ffn, spec.hidden, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.spec.gated:
            return self.down(F.gelu(self.up(x)))
        gate, up = self.up(x).chunk(2, dim=-1) if self.spec.fused_gate else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.norm_attention, self.norm_ffn = nn.LayerNorm(spec.hidden), nn.LayerNorm(spec.hidden)
        heads = (spec.kv_heads, spec.repeat, spec.head_dim)
        attention = Attention(*heads, spec.bias, spec.projection, spec.positions, spec.attention)
        self.attention, self.ffn = attention.module(Shape("sequence", spec.hidden)), FeedForward(spec)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.ffn(self.norm_ffn(x))


class Decoder(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, spec.hidden)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.hidden)
        self.head = nn.Linear(spec.hidden, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(spec: Spec, seed: int = 0) -> nn.Module:
    """The decoder of a specification, with random weights large enough that every channel shows in the
    output.
    """
    return randomise(Decoder(spec), seed, std=0.7)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random input of a decoder."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
