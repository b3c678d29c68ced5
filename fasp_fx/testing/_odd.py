"""Blocks in which channels lie where a reader, or an analysis, may not expect them, and their modules in
plain torch. Each leads to the shape that it follows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._channels import ROWS
from ._spec import Assembled, Block, Shape

#: the tokens of a window: some examples fill no more than one, others more
_WINDOW = 3


@dataclass(frozen=True, repr=False)
class Odd(Block):
    """What all of these share.

    Attributes:
        in_blocks: the kinds whose channels come in ``blocks``.
    """

    in_blocks: ClassVar[tuple[str, ...]] = ()

    def behind(self, shape: Shape) -> Shape:
        kind, blocks = getattr(self, "kind", ""), getattr(self, "blocks", 1)
        return self.divided(shape, blocks if kind in self.in_blocks else 1, "blocks")


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


@dataclass(frozen=True, repr=False)
class Across(Odd):
    """The channels in ``blocks``, and an operator that goes across them: the same position of every block
    meets. Any layout.
    """

    kind: str = "roll"
    blocks: int = 2
    choices: ClassVar = {"kind": tuple(_ACROSS)}
    in_blocks = tuple(_ACROSS)

    def module(self, shape: Shape) -> nn.Module:
        def across(m: Any, x: Tensor) -> Tensor:
            dim = shape.channel_dim % x.dim()
            return _ACROSS[self.kind](x.unflatten(dim, (self.blocks, -1)), dim).flatten(dim, dim + 1)

        return Assembled(across)


_REGROUPED: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {
    "heads": lambda x, blocks, scale: (
        x.reshape(x.shape[0], blocks, -1, x.shape[2] // blocks).transpose(1, 2).reshape(x.shape)
    ),
    "turned": lambda x, blocks, scale: x.transpose(1, 2).reshape(x.shape),
    "batch": lambda x, blocks, scale: x.transpose(0, 2).reshape(x.shape),
    "rows": lambda x, blocks, scale: (x.reshape(x.shape[0], x.shape[2], -1) * scale[:, None]).view(x.shape),
    "chunk": lambda x, blocks, scale: torch.cat(x.flatten(1).chunk(2, 1)[::-1], 1).view(x.shape),
    "flatten": lambda x, blocks, scale: torch.tanh(x.flatten(1)).view(x.shape),
    "crosswise": lambda x, blocks, scale: x.repeat(1, 1, x.shape[1]).view(*x.shape, x.shape[1]).sum(3),
}


@dataclass(frozen=True, repr=False)
class Regroup(Odd):
    """A reshape that reads tokens and channels in another order than they lie in, and one back.

    ``heads`` (in ``blocks``) without the transpose that should precede it; ``turned`` and read as before;
    ``batch`` in the place of channels; ``rows`` of as many channels, each with a scale; halves of the
    flattened sequence exchanged (``chunk``); ``flatten`` and back, which moves nothing; repeated as often as
    there are tokens and read ``crosswise``.
    """

    kind: str = "heads"
    blocks: int = 2
    layouts = ("sequence",)
    choices: ClassVar = {"kind": tuple(_REGROUPED)}
    in_blocks = ("heads",)

    def module(self, shape: Shape) -> nn.Module:
        scale = nn.Parameter(torch.ones(shape.channels))
        return Assembled(lambda m, x: _REGROUPED[self.kind](x, self.blocks, m.scale), scale=scale)


@dataclass(frozen=True, repr=False)
class Remember(Odd):
    """A buffer that every call writes.

    The ``order`` of the channels (also ``beside`` them as they were) or of the ``blocks`` that they come in,
    a ``counter``, the ``trace`` of their means.
    """

    kind: str = "order"
    blocks: int = 2
    layouts = ROWS
    choices: ClassVar = {"kind": ("order", "beside", "blocks", "counter", "trace")}
    in_blocks = ("blocks",)

    def module(self, shape: Shape) -> nn.Module:
        order = torch.arange(self.blocks if self.kind == "blocks" else shape.channels).flip(0)
        calls, trace = torch.zeros((), dtype=torch.long), torch.zeros(shape.channels)
        buffers = {"order": order, "calls": calls, "trace": trace}
        return Assembled(self.remembered, **{name: nn.Buffer(buffer) for name, buffer in buffers.items()})

    def remembered(self, m: Any, x: Tensor) -> Tensor:
        """What is made of a tensor and of the buffers, which this writes."""
        output = {
            "counter": lambda: x * (1 + 0.5 * m.calls),
            "trace": lambda: x + m.trace,
            "blocks": lambda: x.unflatten(-1, (self.blocks, -1))[..., m.order, :].flatten(-2),
            "order": lambda: x[..., m.order],
            "beside": lambda: x + x[..., m.order],
        }[self.kind]()
        written, value = {
            "counter": lambda: (m.calls, m.calls + 1),
            "trace": lambda: (m.trace, x.detach().mean(tuple(range(x.dim() - 1)))),
        }.get(self.kind, lambda: (m.order, m.order.roll(1)))()
        written.copy_(value)
        return output


# --- operators that no rule describes, one for each form that a return can have. All mix the last dimension,
# so that a channel less shows


_LIBRARY = torch.library.Library("fasp_fx_odd", "DEF")


def _mixed(x: Tensor) -> Tensor:
    return x + 0.5 * x.flip(-1)


def _fill(into: Tensor, x: Tensor) -> None:
    into.copy_(x.cumsum(-1))


#: schema, what it does, and what it does to fake tensors
_OPERATORS: list[tuple[str, Callable[..., object], Callable[..., object]]] = [
    (
        "number(Tensor x) -> SymInt",
        lambda x: int((x > 0).sum()),
        lambda x: torch.library.get_ctx().new_dynamic_size(),
    ),
    (
        "pair(Tensor x) -> (int, Tensor)",
        lambda x: (x.shape[-1], _mixed(x)),
        lambda x: (x.shape[-1], torch.empty_like(x)),
    ),
    (
        "several(Tensor x) -> (Tensor[], Tensor)",
        lambda x: ([2 * x, x.flip(-1)], _mixed(x)),
        lambda x: ([torch.empty_like(x), torch.empty_like(x)], torch.empty_like(x)),
    ),
    ("fill(Tensor(a!) into, Tensor x) -> ()", _fill, lambda into, x: None),
]
for _schema, _real, _fake in _OPERATORS:
    _name = _schema.partition("(")[0]
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _real, "CPU")
    _LIBRARY.impl(_name, _real, "CUDA")
    torch.library.register_fake(f"fasp_fx_odd::{_name}", _fake, lib=_LIBRARY)


@dataclass(frozen=True, repr=False)
class Foreign(Odd):
    """A custom operator that nobody has described, with any return.

    It gives a ``number``; a ``pair`` of a number and a tensor; ``several`` tensors in a list and one more; or
    nothing, and does ``fill`` an argument. Gradients go round it. Any layout.
    """

    kind: str = "pair"
    choices: ClassVar = {"kind": ("number", "pair", "several", "fill")}

    def module(self, shape: Shape) -> nn.Module:
        return Assembled(lambda m, x: self.mixed(x.detach()))

    def mixed(self, x: Tensor) -> Tensor:
        """What becomes of a tensor whose channels are last, or along its second dimension."""
        operators = torch.ops.fasp_fx_odd
        if self.kind == "number":
            return x * (1 + operators.number(x))
        if self.kind == "pair":
            count, values = operators.pair(x)
            return values / count
        if self.kind == "several":
            first, second = operators.several(x)
            return first[1] + second
        target = torch.zeros_like(x)
        operators.fill(target, x)
        return target


_SIZED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "pad": lambda x, blocks: F.pad(x, (x.shape[1], 0))[..., : x.shape[2]],
    "slice": lambda x, blocks: F.pad(x[..., : x.shape[1]], (0, x.shape[2]))[..., : x.shape[2]],
    "blocks": lambda x, blocks: (
        x + x.unflatten(-1, (blocks, -1))[:, :, : x.shape[1]].sum(-2).repeat(1, 1, blocks)
    ),
    "last": lambda x, blocks: x + x.flatten(1)[:, -1][:, None, None],
    "end": lambda x, blocks: x + x.flatten(1)[:, -x.shape[2] :].unsqueeze(1),
    "time": lambda x, blocks: torch.cat([x[:, : x.shape[1] // 2], 2 * x[:, x.shape[1] // 2 :]], 1),
    "select": lambda x, blocks: x * x[..., x.shape[1] - 1].unsqueeze(-1),
    "spread": lambda x, blocks: (
        x
        * ((torch.arange(x.shape[1], device=x.device) + 1).to(x.dtype) / x.shape[1])
        .view(1, -1, 1)
        .expand_as(x)
    ),
}


@dataclass(frozen=True, repr=False)
class Sized(Odd):
    """The number of tokens used as a number.

    It says which channel to ``select``, how far to ``pad``, where to ``slice``, how many of the ``blocks`` to
    take, what is the ``last`` element or the ``end`` of the flattened sequence, where the halves in ``time``
    meet; or each token's part of it is ``spread`` over the channels.
    """

    kind: str = "pad"
    blocks: int = 2
    layouts = ("sequence",)
    choices: ClassVar = {"kind": tuple(_SIZED)}
    in_blocks = ("blocks",)

    def behind(self, shape: Shape) -> Shape:
        if self.kind == "select" and shape.sizes[0] > shape.channels:
            raise self.refuse(shape, "there are more tokens than channels")
        return super().behind(shape)

    def module(self, shape: Shape) -> nn.Module:
        return Assembled(lambda m, x: _SIZED[self.kind](x, self.blocks))


_REUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    **{
        kind: lambda m, x: F.linear(torch.tanh(F.linear(x, m.weight)), m.weight.t())
        for kind in ("autoencoder", "square")
    },
    "columns": lambda m, x: m.out(torch.tanh(F.linear(torch.tanh(m.into(x)), F.normalize(m.weight, dim=0)))),
    "rows": lambda m, x: m.out(torch.tanh(F.linear(torch.tanh(m.into(x)), F.normalize(m.weight, dim=1)))),
    "gram": lambda m, x: F.linear(x, m.weight.t() @ m.weight),
}


@dataclass(frozen=True, repr=False)
class Reuse(Odd):
    """One weight read in two ways, with ``width`` channels in between.

    ``autoencoder``: up, and down by the transposed weight; weights whose ``columns`` or ``rows`` are
    normalised in every call; a ``square`` one applied twice, the second time transposed; ``gram``: times the
    weight's products with itself.
    """

    width: int
    kind: str = "autoencoder"
    layouts = ROWS
    choices: ClassVar = {"kind": ("autoencoder", "columns", "rows", "square", "gram")}

    def module(self, shape: Shape) -> nn.Module:
        channels = shape.channels
        rows = channels if self.kind == "square" else self.width
        layers = {"into": nn.Linear(channels, channels), "out": nn.Linear(self.width, channels)}
        layers = layers if self.kind in ("columns", "rows") else {}
        return Assembled(_REUSED[self.kind], weight=nn.Parameter(torch.empty(rows, channels)), **layers)


#: which of three second layers follow the first ones
_INDICES: dict[str, Callable[[Tensor], Any]] = {
    "permuted": lambda x: torch.tensor([2, 0, 1]),
    "twice": lambda x: [0, 0, 2],
    "computed": lambda x: torch.arange(3, device=x.device).flip(0),
    "chosen": lambda x: (
        x.detach().reshape(-1, x.shape[-1]).mean(0).argmax() % 3
        + torch.zeros(3, dtype=torch.long, device=x.device)
    ),
}


def _from_stack(kind: str, m: Any, x: Tensor) -> Tensor:
    """A stack of two-layer weights, taken one by one or by indices."""
    if kind in _INDICES:
        hidden = torch.tanh(torch.einsum("...c,ewc->e...w", x, m.into))
        return torch.einsum("e...w,ecw->...c", hidden, m.back[_INDICES[kind](x)])
    pairs = [(m.into[at], m.back[at]) for at in range(3)] if kind == "one_by_one" else None
    pairs = pairs or list(zip(m.into.unbind(0), m.back.unbind(0), strict=True))
    return torch.stack([F.linear(torch.tanh(F.linear(x, up)), down) for up, down in pairs]).sum(0)


#: channels at positions that are known only at run time, given those of the largest
_OF_CHANNELS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "gather": lambda m, x, at: x - x.gather(-1, at),
    "largest": lambda m, x, at: x - 0.5 * x.index_select(-1, at.reshape(-1)[:1]),
    "table": lambda m, x, at: x + m.table[at[..., 0]],
}


@dataclass(frozen=True, repr=False)
class Pick(Odd):
    """Positions that indices name.

    Of channels: ``gather`` the largest of each vector, take that which is ``largest`` in the first one, or
    look its position up in a ``table``. Of a stack of three two-layer weights with ``width`` neurons: all by
    ``unbind`` or ``one_by_one``; the second layers ``permuted``, one ``twice``, in a ``computed`` order, or
    one ``chosen`` by the input.
    """

    width: int
    kind: str = "gather"
    layouts = ROWS
    choices: ClassVar = {"kind": (*_OF_CHANNELS, "unbind", "one_by_one", *_INDICES)}

    def module(self, shape: Shape) -> nn.Module:
        channels = shape.channels
        if self.kind in _OF_CHANNELS:
            return Assembled(
                lambda m, x: _OF_CHANNELS[self.kind](m, x, x.detach().argmax(-1, keepdim=True)),
                table=nn.Parameter(torch.empty(channels, channels)),
            )
        return Assembled(
            lambda m, x: _from_stack(self.kind, m, x),
            into=nn.Parameter(torch.empty(3, self.width, channels)),
            back=nn.Parameter(torch.empty(3, channels, self.width)),
        )


#: what is done to the tokens of a fused product ``[batch, tokens, channels]``, given the number of windows
_LAID_OUT: dict[str, Callable[[Tensor, int], Tensor]] = {
    "whole": lambda fused, windows: fused,
    "stacked": lambda fused, windows: fused,
    "turned": lambda fused, windows: fused.transpose(0, 1),
    "flat": lambda fused, windows: fused.flatten(0, 1).view(fused.shape),
    "windows": lambda fused, windows: fused.view(fused.shape[0], windows, _WINDOW, fused.shape[2]),
    "batch": lambda fused, windows: fused.view(fused.shape[0] * windows, _WINDOW, fused.shape[2]),
    "across": lambda fused, windows: (
        fused.view(fused.shape[0], windows, _WINDOW, fused.shape[2]).transpose(1, 2).reshape(fused.shape)
    ),
    "cut": lambda fused, windows: fused[:, : fused.shape[1] - fused.shape[1] // 4],
    "half": lambda fused, windows: fused[:, : fused.shape[1] // 2],
    "shifted": lambda fused, windows: F.pad(fused, (0, 0, fused.shape[1] // 4, -(fused.shape[1] // 4))),
    "backwards": lambda fused, windows: fused.flip(1),
}


@dataclass(frozen=True, repr=False)
class Fused(Odd):
    """Attention of ``heads`` of ``width`` channels, with queries, keys and values in one weight, whose tokens
    are moved before the three are taken apart.

    They stay where they are in the ``whole`` sequence, where the three are ``stacked`` before the heads,
    where tokens are ``turned`` to the front, or made ``flat`` with the samples and put back. They come in
    ``windows`` of three, in windows that join the ``batch``, or go ``across`` windows. The last quarter is
    ``cut`` off, or the second ``half``; they are ``shifted`` by a quarter, or go ``backwards``.
    """

    width: int
    kind: str = "whole"
    heads: int = 2
    layouts = ("sequence",)
    choices: ClassVar = {"kind": tuple(_LAID_OUT)}

    def module(self, shape: Shape) -> nn.Module:
        inner = self.heads * self.width
        qkv, out = nn.Linear(shape.channels, 3 * inner), nn.Linear(inner, shape.channels)
        return Assembled(self.attended, qkv=qkv, out=out)

    def attended(self, m: Any, x: Tensor) -> Tensor:
        """Attention over a sequence; what it returns has the shape of what it is given."""
        batch, tokens, _ = x.shape
        windows = (tokens + _WINDOW - 1) // _WINDOW
        if self.kind in ("windows", "batch", "across"):
            x = F.pad(x, (0, 0, 0, windows * _WINDOW - tokens))
        q, k, v = self.parts(_LAID_OUT[self.kind](m.qkv(x), windows))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)
        if self.kind in ("windows", "batch"):
            mixed = mixed.reshape(batch, windows * _WINDOW, self.heads * self.width)
        output = m.out(mixed)
        if self.kind in ("cut", "half"):  # nothing comes of what was cut off
            output = F.pad(output, (0, 0, 0, tokens))
        return output[:, :tokens] if self.kind in ("windows", "batch", "across", "cut", "half") else output

    def parts(self, fused: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each ``[batch, …, heads, tokens, width]``."""
        if self.kind == "stacked":
            return fused.unflatten(-1, (3, self.heads, self.width)).permute(2, 0, 3, 1, 4).unbind(0)
        apart = fused.unflatten(-1, (self.heads, 3, self.width))
        if self.kind == "turned":  # tokens come first
            return apart.permute(3, 1, 2, 0, 4).unbind(0)
        return apart.transpose(-4, -3).unbind(-2)
