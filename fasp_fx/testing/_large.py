"""Attention and mixtures of experts, and their modules the way model code writes them."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasp_fx.errors import ArgumentError

from ._channels import ROWS
from ._spec import Assembled, Block, Shape


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
        channels, q, kv = shape.channels, self.heads * self.head_dim, self.kv_heads * self.head_dim
        widths = {"q": q, "k": kv, "v": kv} if self.projection == "separate" else {"qkv": q + 2 * kv}
        parts = {name: nn.Linear(channels, width, bias=self.bias) for name, width in widths.items()}
        frequencies = 1.0 / (10.0 ** (torch.arange(0, self.head_dim, 2) / self.head_dim))
        return Assembled(
            self.attended,
            **parts,
            out=nn.Linear(q, channels, bias=self.bias),
            frequencies=nn.Buffer(frequencies, persistent=False),
        )

    def project(self, m: Any, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each ``[batch, heads, tokens, head_dim]``."""
        batch, tokens, _ = x.shape
        q, kv, d = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.head_dim
        if self.projection == "stacked":
            parts = m.qkv(x).view(batch, tokens, 3, self.heads, d).permute(2, 0, 3, 1, 4)
            return parts[0], parts[1], parts[2]
        if self.projection == "interleaved":
            parts = m.qkv(x).view(batch, tokens, self.kv_heads, self.repeat + 2, d)
            queries = parts[..., :-2, :].reshape(batch, tokens, self.heads, d)
            projected: tuple[Tensor, ...] = (queries, parts[..., -2, :], parts[..., -1, :])
        else:
            separate = self.projection == "separate"
            flat = (m.q(x), m.k(x), m.v(x)) if separate else m.qkv(x).split([q, kv, kv], dim=-1)
            projected = tuple(part.view(batch, tokens, -1, d) for part in flat)
        return tuple(part.transpose(1, 2) for part in projected)

    def share(self, x: Tensor) -> Tensor:
        """Give every query head its key or value head."""
        times = self.repeat
        if self.sharing == "interleave":
            return x.repeat_interleave(times, dim=1)
        batch, heads, tokens, d = x.shape
        return x[:, :, None].expand(batch, heads, times, tokens, d).reshape(batch, heads * times, tokens, d)

    def attended(self, m: Any, x: Tensor) -> Tensor:
        """Causal self-attention over ``[batch, tokens, channels]``."""
        batch, tokens, _ = x.shape
        q, k, v = self.project(m, x)
        if self.positions != "none":
            angles = torch.arange(tokens, device=x.device)[:, None] * m.frequencies
            pairs = self.positions == "rope_pairs"
            angles = angles.repeat_interleave(2, dim=-1) if pairs else torch.cat([angles, angles], dim=-1)
            q, k = (_rotate(part, angles.cos(), angles.sin(), self.positions) for part in (q, k))
        native = self.kernel == "sdpa" and self.sharing == "native"
        if self.repeat > 1 and not native:
            k, v = self.share(k), self.share(v)
        if self.kernel == "sdpa":
            shared = native and self.repeat > 1
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        else:
            later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
            scores = (q @ k.transpose(-2, -1)) / self.head_dim**0.5
            mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        return m.out(mixed.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: str) -> Tensor:
    if positions == "rope_pairs":  # neighbours turn together
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    else:  # the halves turn together
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    return x * cos + turned * sin


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
        channels, count, width = shape.channels, self.count, self.width
        parts: dict[str, nn.Module | Tensor] = {"router": nn.Linear(channels, count, bias=False)}
        if self.route == "dense" and self.form == "loop":
            parts["experts"] = nn.ModuleList(
                nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, channels))
                for _ in range(count)
            )
        else:
            parts["up"] = nn.Parameter(torch.empty(count, channels, width))
            parts["down"] = nn.Parameter(torch.empty(count, width, channels))
        return Assembled(self.mixed, **parts)

    def mixed(self, m: Any, x: Tensor) -> Tensor:
        """What the experts add up to; the tokens of a sequence are flattened into the batch."""
        flat = x.reshape(-1, x.shape[-1])
        gates = m.router(flat).softmax(-1)
        if self.route == "top":
            best, chosen = gates.max(-1)
            hidden = torch.relu(torch.bmm(flat[:, None], m.up[chosen]))
            mixed = torch.bmm(hidden, m.down[chosen])[:, 0] * best[:, None]
        elif self.form == "loop":
            parts = [expert(flat) * gates[:, at : at + 1] for at, expert in enumerate(m.experts)]
            mixed = torch.stack(parts).sum(0)
        elif self.form == "bmm":
            hidden = torch.relu(torch.bmm(flat.expand(self.count, -1, -1), m.up))
            mixed = (torch.bmm(hidden, m.down) * gates.t()[..., None]).sum(0)
        else:
            hidden = torch.relu(torch.einsum("nd,edf->nef", flat, m.up))
            mixed = torch.einsum("nef,efd,ne->nd", hidden, m.down, gates)
        return mixed.reshape(x.shape)
