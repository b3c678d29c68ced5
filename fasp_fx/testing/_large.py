"""Attention and mixtures of experts, and their modules the way model code writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasp_fx.errors import ArgumentError

from ._channels import ROWS
from ._spec import Block, Shape


@dataclass(frozen=True, repr=False)
class Attention(Block):
    """Causal self-attention, in which ``repeat`` query heads share each of ``kv_heads`` key and value heads.

    Attributes:
        projection: ``separate`` weights; one ``fused`` weight cut into [q | k | v]; one ``interleaved``
            weight viewed as [kv_heads, repeat + 2, head_dim]; one ``stacked`` weight viewed as [3, heads,
            head_dim] (for it ``repeat`` is 1).
        positions: ``rope`` turns the halves of a head together, ``rope_pairs`` neighbours.
        kernel: fused (``sdpa``) or written out (``eager``).
        sharing: how shared heads are given out: ``expand`` and reshape, ``interleave`` (repeat), or
            ``native`` to the fused kernel.
    """

    kv_heads: int = 1
    repeat: int = 1
    head_dim: int = 2
    bias: bool = False
    projection: str = "separate"
    positions: str = "none"
    kernel: str = "sdpa"
    sharing: str = "expand"
    layouts = ("sequence",)
    choices: ClassVar = {
        "projection": ("separate", "fused", "interleaved", "stacked"),
        "positions": ("none", "rope", "rope_pairs"),
        "kernel": ("sdpa", "eager"),
        "sharing": ("expand", "interleave", "native"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection == "stacked" and self.repeat != 1:
            raise ArgumentError(
                f"repeat={self.repeat} does not go with projection='stacked', which has as many key heads as"
                " query heads"
            )
        if self.positions != "none" and self.head_dim % 2:
            raise ArgumentError(
                f"head_dim={self.head_dim} does not go with positions={self.positions!r}, which turns pairs"
                " of channels"
            )

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return self.kv_heads * self.repeat

    def module(self, shape: Shape) -> nn.Module:
        return AttentionModule(self, shape.channels)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    if pairs:  # neighbours turn together
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    else:  # the halves turn together
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    return x * cos + turned * sin


class AttentionModule(nn.Module):
    """Causal self-attention over ``[batch, tokens, channels]``."""

    def __init__(self, block: Attention, channels: int) -> None:
        super().__init__()
        self.block = block
        q, kv = block.heads * block.head_dim, block.kv_heads * block.head_dim
        if block.projection == "separate":
            self.q, self.k, self.v = (nn.Linear(channels, width, bias=block.bias) for width in (q, kv, kv))
        else:
            self.qkv = nn.Linear(channels, q + 2 * kv, bias=block.bias)
        self.out = nn.Linear(q, channels, bias=block.bias)
        frequencies = 1.0 / (10.0 ** (torch.arange(0, block.head_dim, 2) / block.head_dim))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each ``[batch, heads, tokens, head_dim]``."""
        block, (batch, tokens, _) = self.block, x.shape
        q, kv, d = block.heads * block.head_dim, block.kv_heads * block.head_dim, block.head_dim
        if block.projection == "stacked":
            parts = self.qkv(x).view(batch, tokens, 3, block.heads, d).permute(2, 0, 3, 1, 4)
            return parts[0], parts[1], parts[2]
        if block.projection == "interleaved":
            parts = self.qkv(x).view(batch, tokens, block.kv_heads, block.repeat + 2, d)
            queries = parts[..., :-2, :].reshape(batch, tokens, block.heads, d)
            found: tuple[Tensor, ...] = (queries, parts[..., -2, :], parts[..., -1, :])
        else:
            separate = block.projection == "separate"
            flat = (self.q(x), self.k(x), self.v(x)) if separate else self.qkv(x).split([q, kv, kv], dim=-1)
            found = tuple(part.view(batch, tokens, -1, d) for part in flat)
        return tuple(part.transpose(1, 2) for part in found)

    def share(self, x: Tensor) -> Tensor:
        """Give every query head its key or value head."""
        times = self.block.repeat
        if self.block.sharing == "interleave":
            return x.repeat_interleave(times, dim=1)
        batch, heads, tokens, d = x.shape
        expanded = x[:, :, None].expand(batch, heads, times, tokens, d)
        return expanded.reshape(batch, heads * times, tokens, d)

    def forward(self, x: Tensor) -> Tensor:
        block, (batch, tokens, _) = self.block, x.shape
        q, k, v = self.project(x)
        if block.positions != "none":
            angles = torch.arange(tokens, device=x.device)[:, None] * self.get_buffer("frequencies")
            pairs = block.positions == "rope_pairs"
            angles = angles.repeat_interleave(2, dim=-1) if pairs else torch.cat([angles, angles], dim=-1)
            q, k = (_rotate(part, angles.cos(), angles.sin(), pairs) for part in (q, k))
        native = block.kernel == "sdpa" and block.sharing == "native"
        if block.repeat > 1 and not native:
            k, v = self.share(k), self.share(v)
        if block.kernel == "sdpa":
            shared = native and block.repeat > 1
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        else:
            later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
            scores = (q @ k.transpose(-2, -1)) / block.head_dim**0.5
            mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, block.heads * block.head_dim))


@dataclass(frozen=True, repr=False)
class Experts(Block):
    """``count`` two-layer experts of ``width`` neurons, added up by a softmax router.

    ``route``: ``dense`` computes all, ``top`` gathers the weights of the best one for every token. ``form``
    of dense experts: a ``loop`` over modules, ``bmm`` or ``einsum`` over stacked weights.
    """

    width: int
    count: int = 2
    route: str = "dense"
    form: str = "loop"
    layouts = ROWS
    choices: ClassVar = {"route": ("dense", "top"), "form": ("loop", "bmm", "einsum")}

    def module(self, shape: Shape) -> nn.Module:
        return ExpertsModule(self, shape.channels)


class ExpertsModule(nn.Module):
    """Two-layer experts and their router; the tokens of a sequence are flattened into the batch."""

    def __init__(self, block: Experts, channels: int) -> None:
        super().__init__()
        self.block = block
        self.router = nn.Linear(channels, block.count, bias=False)
        if block.route == "dense" and block.form == "loop":
            layers = (
                [nn.Linear(channels, block.width), nn.ReLU(), nn.Linear(block.width, channels)]
                for _ in range(block.count)
            )
            self.experts = nn.ModuleList(nn.Sequential(*own) for own in layers)
        else:
            self.up = nn.Parameter(torch.empty(block.count, channels, block.width))
            self.down = nn.Parameter(torch.empty(block.count, block.width, channels))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        gates = self.router(flat).softmax(-1)
        if self.block.route == "top":
            best, chosen = gates.max(-1)
            hidden = torch.relu(torch.bmm(flat[:, None], self.up[chosen]))
            mixed = torch.bmm(hidden, self.down[chosen])[:, 0] * best[:, None]
        elif self.block.form == "loop":
            parts = [expert(flat) * gates[:, at : at + 1] for at, expert in enumerate(self.experts)]
            mixed = torch.stack(parts).sum(0)
        elif self.block.form == "bmm":
            hidden = torch.relu(torch.bmm(flat.expand(self.block.count, -1, -1), self.up))
            mixed = (torch.bmm(hidden, self.down) * gates.t()[..., None]).sum(0)
        else:
            hidden = torch.relu(torch.einsum("nd,edf->nef", flat, self.up))
            mixed = torch.einsum("nef,efd,ne->nd", hidden, self.down, gates)
        return mixed.reshape(x.shape)
