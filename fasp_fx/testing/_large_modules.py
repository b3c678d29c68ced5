"""Attention and mixtures of experts, in plain torch, the way model code writes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._large_blocks import Attention, Experts


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    if pairs:  # neighbours turn together
        even, odd = x[..., ::2], x[..., 1::2]
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
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
        self.register_buffer(
            "frequencies",
            1.0 / (10.0 ** (torch.arange(0, block.head_dim, 2) / block.head_dim)),
            persistent=False,
        )

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each ``[batch, heads, tokens, head_dim]``."""
        block, (batch, tokens, _) = self.block, x.shape
        q, kv, d = block.heads * block.head_dim, block.kv_heads * block.head_dim, block.head_dim
        if block.projection == "stacked":
            parts = self.qkv(x).view(batch, tokens, 3, block.heads, d).permute(2, 0, 3, 1, 4)
            return parts[0], parts[1], parts[2]
        if block.projection == "interleaved":
            parts = self.qkv(x).view(batch, tokens, block.kv_heads, block.repeat + 2, d)
            found: tuple[Tensor, ...] = (
                parts[..., :-2, :].reshape(batch, tokens, block.heads, d),
                parts[..., -2, :],
                parts[..., -1, :],
            )
        else:
            flat = (
                (self.q(x), self.k(x), self.v(x))
                if block.projection == "separate"
                else self.qkv(x).split([q, kv, kv], dim=-1)
            )
            found = tuple(part.view(batch, tokens, -1, d) for part in flat)
        return tuple(part.transpose(1, 2) for part in found)

    def share(self, x: Tensor) -> Tensor:
        """Give every query head its key or value head."""
        if self.block.sharing == "interleave":
            return x.repeat_interleave(self.block.repeat, dim=1)
        batch, heads, tokens, d = x.shape
        return (
            x[:, :, None]
            .expand(batch, heads, self.block.repeat, tokens, d)
            .reshape(batch, heads * self.block.repeat, tokens, d)
        )

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
            mixed = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=native and block.repeat > 1
            )
        else:
            later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
            scores = (q @ k.transpose(-2, -1)) / block.head_dim**0.5
            mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, block.heads * block.head_dim))


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
            mixed = torch.stack(
                [expert(flat) * gates[:, index : index + 1] for index, expert in enumerate(self.experts)]
            ).sum(0)
        elif self.block.form == "bmm":
            hidden = torch.relu(torch.bmm(flat.expand(self.block.count, -1, -1), self.up))
            mixed = (torch.bmm(hidden, self.down) * gates.t()[..., None]).sum(0)
        else:
            hidden = torch.relu(torch.einsum("nd,edf->nef", flat, self.up))
            mixed = torch.einsum("nef,efd,ne->nd", hidden, self.down, gates)
        return mixed.reshape(x.shape)
