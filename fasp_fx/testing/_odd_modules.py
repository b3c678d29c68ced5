"""The modules of odd blocks, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._fused_module import FusedAttention
from ._odd_blocks import Across, Foreign, Fused, Odd, Pick, Regroup, Remember, Reuse, Sized
from ._odd_operators import foreign
from ._spec import Shape

_ACROSS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "roll": lambda h, dim: h.roll(1, dim),
    "flip": lambda h, dim: h.flip(dim),
    "cumsum": lambda h, dim: h.cumsum(dim),
    "cumprod": lambda h, dim: h.cumprod(dim),
    "cummax": lambda h, dim: h.cummax(dim).values,
    "logcumsumexp": lambda h, dim: h.logcumsumexp(dim),
    "sort": lambda h, dim: h.sort(dim).values,
    "argsort": lambda h, dim: h + h.argsort(dim),
    "fourier": lambda h, dim: torch.fft.fft(h, dim=dim).abs(),
    "softmax": lambda h, dim: h.softmax(dim),
}


class AcrossBlocks(nn.Module):
    """An operator along the dimension of the blocks."""

    def __init__(self, block: Across, dim: int) -> None:
        super().__init__()
        self.kind, self.blocks, self.dim = block.kind, block.blocks, dim

    def forward(self, x: Tensor) -> Tensor:
        dim = self.dim % x.dim()
        return _ACROSS[self.kind](x.unflatten(dim, (self.blocks, -1)), dim).flatten(dim, dim + 1)


class Regrouped(nn.Module):
    """Tokens and channels read in another order."""

    def __init__(self, block: Regroup, channels: int) -> None:
        super().__init__()
        self.kind, self.blocks = block.kind, block.blocks
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        if self.kind == "heads":
            return x.reshape(batch, self.blocks, -1, channels // self.blocks).transpose(1, 2).reshape(x.shape)
        if self.kind == "turned":
            return x.transpose(1, 2).reshape(x.shape)
        if self.kind == "batch":
            return x.transpose(0, 2).reshape(x.shape)
        if self.kind == "rows":
            return (x.reshape(batch, channels, -1) * self.scale[:, None]).view(x.shape)
        if self.kind == "chunk":
            return torch.cat(x.flatten(1).chunk(2, 1)[::-1], 1).view(x.shape)
        if self.kind == "flatten":
            return torch.tanh(x.flatten(1)).view(x.shape)
        return x.repeat(1, 1, tokens).view(batch, tokens, channels, tokens).sum(3)


class Remembering(nn.Module):
    """A buffer that every call writes."""

    def __init__(self, block: Remember, channels: int) -> None:
        super().__init__()
        self.kind, self.blocks = block.kind, block.blocks
        self.register_buffer(
            "order", torch.arange(block.blocks if block.kind == "blocks" else channels).flip(0)
        )
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("trace", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        order, calls, trace = self.get_buffer("order"), self.get_buffer("calls"), self.get_buffer("trace")
        if self.kind == "counter":
            found = x * (1 + 0.5 * calls)
            calls.add_(1)
            return found
        if self.kind == "trace":
            found = x + trace
            trace.copy_(x.detach().mean(tuple(range(x.dim() - 1))))
            return found
        found = (
            x.unflatten(-1, (self.blocks, -1))[..., order, :].flatten(-2)
            if self.kind == "blocks"
            else x[..., order]
        )
        order.copy_(order.roll(1))
        return x + found if self.kind == "beside" else found


class ForeignOperator(nn.Module):
    """A custom operator of which nothing is known; gradients go round it."""

    def __init__(self, block: Foreign) -> None:
        super().__init__()
        self.kind = block.kind

    def forward(self, x: Tensor) -> Tensor:
        return foreign(self.kind, x.detach())


class SizedByTokens(nn.Module):
    """The number of tokens as a number."""

    def __init__(self, block: Sized) -> None:
        super().__init__()
        self.kind, self.blocks = block.kind, block.blocks

    def forward(self, x: Tensor) -> Tensor:
        _, tokens, channels = x.shape
        if self.kind == "select":
            return x * x[..., tokens - 1].unsqueeze(-1)
        if self.kind == "pad":
            return F.pad(x, (tokens, 0))[..., :channels]
        if self.kind == "slice":
            return F.pad(x[..., :tokens], (0, channels))[..., :channels]
        if self.kind == "blocks":
            return x + x.unflatten(-1, (self.blocks, -1))[:, :, :tokens].sum(-2).repeat(1, 1, self.blocks)
        if self.kind == "last":
            return x + x.flatten(1)[:, -1][:, None, None]
        if self.kind == "end":
            return x + x.flatten(1)[:, -channels:].unsqueeze(1)
        if self.kind == "spread":
            part = (torch.arange(tokens, device=x.device) + 1).to(x.dtype) / tokens
            return x * part.view(1, -1, 1).expand_as(x)
        return torch.cat([x[:, : tokens // 2], 2 * x[:, tokens // 2 :]], 1)


class ReusedWeight(nn.Module):
    """One weight read in two ways."""

    def __init__(self, block: Reuse, channels: int) -> None:
        super().__init__()
        self.kind = block.kind
        self.weight = nn.Parameter(torch.empty(channels if block.kind == "square" else block.width, channels))
        if block.kind in ("columns", "rows"):
            self.into, self.out = nn.Linear(channels, channels), nn.Linear(block.width, channels)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.kind in ("columns", "rows"):
            return self.out(
                torch.tanh(
                    F.linear(
                        torch.tanh(self.into(x)), F.normalize(weight, dim=0 if self.kind == "columns" else 1)
                    )
                )
            )
        if self.kind == "gram":
            return F.linear(x, weight.t() @ weight)
        return F.linear(torch.tanh(F.linear(x, weight)), weight.t())


class PickedStack(nn.Module):
    """A stack of two-layer weights, taken one by one or by indices."""

    def __init__(self, block: Pick, channels: int) -> None:
        super().__init__()
        self.kind = block.kind
        self.into, self.back = (
            nn.Parameter(torch.empty(3, block.width, channels)),
            nn.Parameter(torch.empty(3, channels, block.width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "unbind":
            pairs = list(zip(self.into.unbind(0), self.back.unbind(0), strict=True))
            return torch.stack([F.linear(torch.tanh(F.linear(x, up)), down) for up, down in pairs]).sum(0)
        if self.kind == "one_by_one":
            return torch.stack(
                [F.linear(torch.tanh(F.linear(x, self.into[at])), self.back[at]) for at in range(3)]
            ).sum(0)
        hidden = torch.tanh(torch.einsum("...c,ewc->e...w", x, self.into))
        return torch.einsum("e...w,ecw->...c", hidden, self.back[self.indices(x)])

    def indices(self, x: Tensor) -> Tensor | list[int]:
        """Which of the second layers follow the first ones."""
        if self.kind == "permuted":
            return torch.tensor([2, 0, 1])
        if self.kind == "twice":
            return [0, 0, 2]
        if self.kind == "computed":
            return torch.arange(3, device=x.device).flip(0)
        return x.detach().reshape(-1, x.shape[-1]).mean(0).argmax() % 3 + torch.zeros(
            3, dtype=torch.long, device=x.device
        )


class PickedChannels(nn.Module):
    """Channels at positions that are known only at run time."""

    def __init__(self, block: Pick, channels: int) -> None:
        super().__init__()
        self.kind = block.kind
        self.table = nn.Parameter(torch.empty(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        at = x.detach().argmax(-1, keepdim=True)
        if self.kind == "gather":
            return x - x.gather(-1, at)
        if self.kind == "table":
            return x + self.table[at[..., 0]]
        return x - 0.5 * x.index_select(-1, at.reshape(-1)[:1])


@singledispatch
def odd(block: Odd, shape: Shape) -> nn.Module:
    """The module of an odd block behind a shape."""
    raise TypeError(f"{type(block).__name__} has no module")


@odd.register
def _(block: Across, shape: Shape) -> nn.Module:
    return AcrossBlocks(block, shape.channel_dim)


@odd.register
def _(block: Regroup, shape: Shape) -> nn.Module:
    return Regrouped(block, shape.channels)


@odd.register
def _(block: Remember, shape: Shape) -> nn.Module:
    return Remembering(block, shape.channels)


@odd.register
def _(block: Foreign, shape: Shape) -> nn.Module:
    return ForeignOperator(block)


@odd.register
def _(block: Sized, shape: Shape) -> nn.Module:
    return SizedByTokens(block)


@odd.register
def _(block: Reuse, shape: Shape) -> nn.Module:
    return ReusedWeight(block, shape.channels)


@odd.register
def _(block: Pick, shape: Shape) -> nn.Module:
    return (PickedChannels if block.kind in ("gather", "largest", "table") else PickedStack)(
        block, shape.channels
    )


@odd.register
def _(block: Fused, shape: Shape) -> nn.Module:
    return FusedAttention(block, shape.channels)
