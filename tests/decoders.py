"""Decoders drawn at random: a specification, a module built from it in plain torch, and a hypothesis strategy
over specifications.

They cover the layouts that real models use (fused and interleaved projections, grouped queries, parallel
blocks, …) in all combinations, and are small enough to be captured in a fraction of a second. The first value
of every choice is the simplest; drawing shrinks to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import randomise

from fasp_fx.testing._channels import PlainRMSNorm
from fasp_fx.testing._large import AttentionModule
from fasp_fx.testing.specs import Attention

VOCABULARY = 11
MAX_TOKENS = 16


@dataclass(frozen=True)
class Spec:
    """A decoder. ``repeat`` query heads share each of ``kv_heads`` key and value heads.

    ``projection``: ``separate`` weights; one ``fused`` weight cut into [q | k | v]; one ``interleaved``
    weight viewed as [kv_heads, repeat + 2, head_dim]; one ``stacked`` weight viewed as [3, heads, head_dim]
    (for it ``repeat`` is 1).
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
    tied: bool = False
    positions: str = "none"
    parallel: bool = False
    projection: str = "separate"
    norm: str = "layer"
    attention: str = "sdpa"
    sharing: str = "expand"

    @property
    def heads(self) -> int:
        return self.kv_heads * self.repeat


_NORMS: dict[str, Any] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "plain_rms": PlainRMSNorm}


def _attention(spec: Spec) -> Attention:
    positions = spec.positions if spec.positions.startswith("rope") else "none"
    return Attention(
        spec.kv_heads,
        spec.repeat,
        spec.head_dim,
        spec.bias,
        spec.projection,
        positions,
        spec.attention,
        spec.sharing,
    )


class FeedForward(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        if spec.gated and not spec.fused_gate:
            self.gate = nn.Linear(spec.hidden, spec.ffn, bias=spec.bias)
        self.up = nn.Linear(
            spec.hidden, spec.ffn * (2 if spec.gated and spec.fused_gate else 1), bias=spec.bias
        )
        self.down = nn.Linear(spec.ffn, spec.hidden, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.spec.gated:
            return self.down(F.gelu(self.up(x)))
        gate, up = self.up(x).chunk(2, dim=-1) if self.spec.fused_gate else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.parallel = spec.parallel
        self.norm_attention, self.norm_ffn = _NORMS[spec.norm](spec.hidden), _NORMS[spec.norm](spec.hidden)
        self.attention, self.ffn = AttentionModule(_attention(spec), spec.hidden), FeedForward(spec)

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:
            return x + self.attention(self.norm_attention(x)) + self.ffn(self.norm_ffn(x))
        x = x + self.attention(self.norm_attention(x))
        return x + self.ffn(self.norm_ffn(x))


class Decoder(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(VOCABULARY, spec.hidden)
        if spec.positions == "learned":
            self.position = nn.Embedding(MAX_TOKENS, spec.hidden)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.norm = _NORMS[spec.norm](spec.hidden)
        self.head = nn.Linear(spec.hidden, VOCABULARY, bias=False)
        if spec.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.spec.positions == "learned":
            x = x + self.position(torch.arange(tokens.shape[1], device=tokens.device))
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


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Specifications of decoders."""
    flag = st.booleans()
    projection = draw(st.sampled_from(["separate", "fused", "interleaved", "stacked"]))
    gated = draw(flag)
    return Spec(
        layers=draw(st.integers(1, 2)),
        hidden=draw(st.sampled_from([4, 6, 8])),
        kv_heads=draw(st.integers(1, 3)),
        repeat=1 if projection == "stacked" else draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([2, 4, 6, 8])),
        ffn=draw(st.integers(1, 12)),
        bias=draw(flag),
        gated=gated,
        fused_gate=gated and draw(flag),
        tied=draw(flag),
        positions=draw(st.sampled_from(["none", "learned", "rope", "rope_pairs"])),
        parallel=draw(flag),
        projection=projection,
        norm=draw(st.sampled_from(["layer", "rms", "plain_rms"])),
        attention=draw(st.sampled_from(["sdpa", "eager"])),
        sharing=draw(st.sampled_from(["expand", "interleave", "native"])),
    )
