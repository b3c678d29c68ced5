"""What moves, joins, cuts, repeats and picks channels between two layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import between_layers, linear, made, parameter, wide
from torch import Tensor, nn
from torch.nn import functional as F

from . import Entry, Make, drawn, entries, rows, sequences

Function = Callable[[Tensor], Tensor]
BACKWARDS = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])


def layered(forward: Callable[..., Any], **sizes: tuple[int, int]) -> Make:
    """Six features to eight hidden channels, and what stands behind them."""
    return lambda: wide(forward, hidden=8, **linear(**sizes))


def scaled(forward: Callable[..., Any], *shape: int) -> Make:
    return lambda: wide(forward, hidden=8, scale=nn.Parameter(torch.ones(*shape)))


def _parted(self: Any, x: Tensor) -> Tensor:
    first, second = self.up(x).split([3, 5], -1)
    return self.left(first) + self.right(second.sigmoid())


def _gated(self: Any, x: Tensor) -> Tensor:
    gate, up = self.up(x).chunk(2, -1)
    return self.short(F.silu(gate) * up)


def _interleaved(self: Any, x: Tensor) -> Tensor:
    both = self.fused(x)
    return self.short(torch.sigmoid(both[:, 2:11:2]) * both[:, 3:13:2])


def _residual(self: Any, x: Tensor) -> Tensor:
    h = self.up(x)
    return self.down(h + self.inner_down(self.inner_up(h).relu()))


def _stacked(self: Any, x: Tensor) -> Tensor:
    first, second = torch.stack([self.up(x), self.other(x).tanh()]).unbind(0)
    return self.down(first * second)


def _per_head(self: Any, x: Tensor) -> Tensor:
    return self.down((self.up(x).view(-1, 4, 2) * self.scale).flatten(1))


#: small tricky modules
LAYOUTS: dict[str, Make] = {
    "concatenation": layered(
        lambda self, x: self.down(torch.cat([self.left(x).tanh(), self.right(x)], -1)),
        left=(6, 3),
        right=(6, 5),
    ),
    "split": layered(_parted, left=(3, 6), right=(5, 6)),
    # gate and up in one weight: neuron i is rows i and i + 4
    "gated halves": layered(_gated, short=(4, 6)),
    # each channel feeds two columns
    "repeated": layered(lambda self, x: self.wide(self.up(x).repeat(1, 2)), wide=(16, 6)),
    "repeated one by one": layered(
        lambda self, x: self.wide(self.up(x).repeat_interleave(2, -1)), wide=(16, 6)
    ),
    # the border is no channel: its columns stay
    "padded": layered(lambda self, x: self.wide(F.pad(self.up(x), (1, 2), value=0.5)), wide=(11, 6)),
    "cropped": layered(lambda self, x: self.short(F.pad(self.up(x), (-1, 0))), short=(7, 6)),
    "reflected": layered(
        lambda self, x: self.wide(F.pad(self.up(x)[:, None], (1, 2), mode="reflect")[:, 0]), wide=(11, 6)
    ),
    # a border of another dimension leaves the channels alone
    "padded beside": layered(lambda self, x: self.down(F.pad(self.up(x)[:, None], (0, 0, 1, 1)).relu())),
    "flipped": layered(lambda self, x: self.down(self.up(x).flip(-1))),
    # runs of as many neighbours as the step go as a whole, those that nothing reads among them
    "steps": layered(lambda self, x: self.short(self.up(x)[:, ::2]), short=(4, 6)),
    # gate and up as even and odd rows of one weight, some of them left out: each pair goes as a whole
    "interleaved": layered(_interleaved, fused=(6, 14), short=(5, 6)),
    # every third column of two rows of six: equal numbers of runs of three in each row
    "steps in heads": layered(
        lambda self, x: self.short(self.wide(x).unflatten(-1, (2, 6))[:, :, 1::3].flatten(1).relu()),
        wide=(6, 12),
        short=(4, 6),
    ),
    # the rows that nothing reads stay
    "slice": layered(lambda self, x: self.short(self.up(x)[:, 2:-1]), short=(5, 6)),
    "two consumers": layered(lambda self, x: self.down(h := self.up(x).relu()) * self.other(h), other=(8, 6)),
    # one consumer reads all channels, one the first half: two groups, for their consumers differ
    "overlapping consumers": layered(
        lambda self, x: self.down(h := self.up(x).relu()) + self.short(h[:, :4]), short=(4, 6)
    ),
    "used twice": layered(lambda self, x: self.down(self.up(x).relu()) + self.down(self.up(x * 2).tanh())),
    # a skip connection couples three weights; the inner feed-forward is a group of its own
    "residual": layered(_residual, inner_up=(8, 5), inner_down=(5, 8)),
    "a factor for each channel": scaled(lambda self, x: self.down(self.up(x) * self.scale), 8),
    # the heads stay, each loses as many channels
    "a factor for each head": scaled(_per_head, 4, 1),
    # channel i of all heads goes together
    "factors shared by heads": scaled(_per_head, 2),
    "a sum over heads": layered(lambda self, x: self.short(self.up(x).view(-1, 4, 2).sum(1)), short=(2, 6)),
    # two groups of four are dealt out in turn, so that both lose the same places
    "shuffled": layered(lambda self, x: self.down(self.up(x).view(-1, 2, 4).transpose(1, 2).flatten(1))),
    # two branches stacked and taken apart again
    "stacked": layered(_stacked, other=(6, 8)),
    # positions named one by one stay
    "fixed indices": layered(lambda self, x: self.down(self.up(x)[:, BACKWARDS])),
    # a norm over the hidden channels mixes them: pruning them would not be exact
    "normalised": lambda: wide(
        lambda self, x: self.down(self.norm(self.up(x))), hidden=8, norm=nn.LayerNorm(8)
    ),
    "reaches the output": layered(lambda self, x: (self.down(h := self.up(x)), h)),
    # a single channel would be the whole of its dimension
    "one channel": layered(
        lambda self, x: self.down(self.up(x).relu()) + self.wide(self.narrow(x).relu()),
        narrow=(6, 1),
        wide=(1, 6),
    ),
    # the channels of a head vary along its gain, a buffer: no product
    "a gain of heads": lambda: wide(
        lambda self, x: self.down((self.up(x).unflatten(-1, (3, 4)) * self.gain[:, None]).tanh().flatten(-2)),
        hidden=12,
        gain=torch.linspace(0.5, 1.5, 3),
    ),
}


def _mixes(self: Any, x: Tensor) -> Tensor:
    """One block of an MLP-Mixer: across tokens, then across channels."""
    x = x + self.token_down(F.gelu(self.token_up(self.norm(x).transpose(1, 2)))).transpose(1, 2)
    x = x + self.channel_down(F.gelu(self.channel_up(x)))
    return self.head(x.mean(1))


def _mixes_patches(self: Any, x: Tensor) -> Tensor:
    """Embedding channels are made by a weight of the model, and so are mixed tokens: position (c, o) belongs
    to both.
    """
    h = self.mix(self.embed(x).transpose(1, 2)).relu()  # [batch, 6 channels, 7 mixed tokens]
    return self.out(self.head(h.transpose(1, 2)).transpose(1, 2))


MIXERS: dict[str, Entry] = {
    "tokens mixed": Entry(
        lambda: made(
            _mixes,
            norm=nn.LayerNorm(6),
            **linear(token_up=(5, 7), token_down=(7, 5), channel_up=(6, 9), channel_down=(9, 6), head=(6, 3)),
        ),
        sequences(6, (2, 5), (3, 5)),
    ),
    "patches mixed": Entry(
        lambda: made(_mixes_patches, **linear(embed=(4, 6), mix=(5, 7), head=(6, 3), out=(7, 2))),
        sequences(4, (2, 5), (3, 5)),
    ),
}

# --- Functions of twelve hidden channels, the input, a mask over tokens and a parameter of one element.

Form = Callable[[Tensor, Tensor, Tensor, nn.Parameter], Tensor]


def _pairs(h: Tensor) -> tuple[Tensor, ...]:
    return h.unflatten(-1, (6, 2)).unbind(-1)


def _order(x: Tensor) -> Tensor:
    return x[..., :1].argsort(1)


def _blocks(h: Tensor) -> Tensor:
    return h.view(*h.shape[:2], 3, 4)


def _average(h: Tensor, x: Tensor, mask: Tensor, one: Tensor) -> Tensor:
    """The mean over tokens that are shown, as encoders of sentences compute it."""
    shown = mask.unsqueeze(-1).expand(h.size()).float().to(h.dtype)
    return (h * shown).sum(1) / torch.clamp(shown.sum(1), min=1e-9)


#: with how many columns read them; what is repeated over channels is repeated less often once they go, and
#: what is picked leaves them free
BESIDE: dict[str, tuple[Form, int]] = {
    "a mask": (lambda h, x, mask, _: h * mask.unsqueeze(-1).expand_as(h), 12),
    "filled": (lambda h, x, mask, _: h.masked_fill((mask[..., None] == 0).expand_as(h), 0.0), 12),
    "chosen": (lambda h, x, mask, _: torch.where((mask[..., None] > 0).expand(-1, -1, 12), h, 0.1 * h), 12),
    "a parameter": (lambda h, x, _, one: h * one.expand(1, 12), 12),
    "cast": (lambda h, x, mask, _: h * mask.bool().unsqueeze(-1).expand(h.size()).to(h.dtype), 12),
    "repeated mask": (lambda h, x, mask, _: h * mask[..., None].repeat(1, 1, 12), 12),
    "repeated in blocks": (
        lambda h, x, mask, _: (_blocks(h) * mask[..., None, None].repeat(1, 1, 3, 4)).flatten(2),
        12,
    ),
    "channels repeated": (lambda h, x, mask, _: h + h.repeat(1, 1, 2)[..., :12] * mask[..., None], 12),
    "in blocks": (
        lambda h, x, mask, _: (_blocks(h) * mask[..., None, None].expand(-1, -1, 3, 4)).flatten(2),
        12,
    ),
    "joined": (lambda h, x, mask, _: torch.cat([h, mask.unsqueeze(-1).expand_as(h)], -1)[..., :12], 12),
    "averaged": (_average, 12),
    "gathered": (lambda h, x, *_: h.gather(1, _order(x).expand(-1, -1, 12)), 12),
    "taken along": (lambda h, x, *_: torch.take_along_dim(h, _order(x), dim=1), 12),
    "largest token": (
        lambda h, x, *_: h.gather(1, x[..., :1].argmax(1, keepdim=True).expand(-1, -1, 12)),
        12,
    ),
    "pairs by select": (
        lambda h, *_: h.view(*h.shape[:2], 6, 2)[..., 0] * h.view(*h.shape[:2], 6, 2)[..., 1],
        6,
    ),
    "pairs by unbind": (lambda h, *_: torch.stack(_pairs(h)[::-1], -1).flatten(-2) + h, 12),
    "first of every four": (lambda h, *_: h.unflatten(-1, (3, 4))[..., 0], 3),
    # what picks channels, or is another at each of them, keeps these
    "channels by a mask": (lambda h, x, *_: h[..., x.mean((0, 1)).repeat(3)[:12] > -9], 12),
    "channels in order": (lambda h, *_: h.gather(-1, h.argsort(-1)), 12),
    "not all channels": (lambda h, x, *_: h.gather(1, _order(x).expand(-1, -1, 12)[..., :11]), 11),
    "a mask of everything": (
        lambda h, *_: h[(h > -9).all(0).all(0).expand(*h.shape[:2], 12)].view(*h.shape),
        12,
    ),
    "a running sum": (lambda h, x, mask, _: h + mask.unsqueeze(-1).expand(-1, -1, 12).cumsum(-1), 12),
}


def _beside(form: Form, width: int) -> nn.Module:
    return made(
        lambda self, x, mask: self.down(form(self.up(x), x, mask, self.one)),
        up=nn.Linear(5, 12),
        down=nn.Linear(width, 3),
        one=parameter(1, 1),
    )


MASKED = tuple(
    (x, (mask > -0.5).double()) for x, mask in (drawn((b, t, 5), (b, t)) for b, t in ((2, 4), (3, 7)))
)

# --- Functions of twelve channels of a sequence.


def _complex(h: Tensor) -> Tensor:
    return torch.view_as_complex(h.unflatten(-1, (6, 2)))


def _crosswise(h: Tensor) -> Tensor:
    """Blocks that a size deals out."""
    time = h.shape[1]
    turned = h.view(h.shape[0], time, 3, 4).view(h.shape[0], 3, time, 4).transpose(1, 2)
    return F.relu(turned).reshape(h.shape[0], time, 12)


def across(function: Function) -> Function:
    """Of three heads of four channels."""
    return lambda h: function(h.unflatten(-1, (3, 4))).flatten(-2)


def before_and_after(h: Tensor) -> Tensor:
    h = torch.sin(h)
    before = h.exp()
    h.mul_(2.0)
    return before + h


def twice(h: Tensor) -> Tensor:
    h = torch.sin(h)
    h += 1.0
    h *= h.abs()
    return h


def through_a_view(h: Tensor) -> Tensor:
    h = torch.sin(h)
    part = h[..., :4]
    h.mul_(3.0)
    return torch.cat([part, h[..., 4:]], -1)


def into_a_view(h: Tensor) -> Tensor:
    h = torch.sin(h)
    h[..., :4].mul_(3.0)
    return F.relu_(h.sinh().transpose(0, 1)).transpose(0, 1) + h


def into_parts_that_are_read(h: Tensor) -> Tensor:
    h = torch.sin(h)
    first, before = h[:, 0], h[:, 1:].exp()
    h[:, 1:][:, 1:] *= h[:, :1]
    first *= h[:, -1]
    h[:, -1] = first
    h[:, 1:] = before
    return h + first.relu_()[:, None] * before.sum(1, keepdim=True)


def alias_by_name(h: Tensor) -> Tensor:
    h = torch.sin(h)
    torch.feature_dropout(input=h, p=0.5, train=False).add_(1.0)
    return torch.dropout(h, p=0.5, train=False) * 2


def another_type(h: Tensor) -> Tensor:
    return h * torch.ones(12, dtype=torch.float64).gt_(0.5)


#: writes into tensors that forward has made
IN_PLACE = (
    before_and_after,
    twice,
    through_a_view,
    into_a_view,
    into_parts_that_are_read,
    alias_by_name,
    another_type,
)

LIBRARY = torch.library.Library("fasp_fx_read", "DEF")


def _define(schema: str, real: Callable[..., object], fake: Callable[..., object]) -> None:
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, real, "CPU")
    torch.library.register_fake(f"fasp_fx_read::{name}", fake, lib=LIBRARY)


_define(
    "pair(Tensor x) -> (int, Tensor)",
    lambda x: (x.shape[-1], x * torch.arange(x.shape[-1])),
    lambda x: (x.shape[-1], torch.empty_like(x)),
)
_define(
    "fill_(Tensor(a!) into, Tensor values) -> ()",
    lambda into, values: [into.copy_(values.cumsum(-1)), None][1],
    lambda into, values: None,
)
_define(
    "several(Tensor x) -> (Tensor[], Tensor)",
    lambda x: ([x * 2, x.flip(-1)], x * 3),
    lambda x: ([torch.empty_like(x), torch.empty_like(x)], torch.empty_like(x)),
)
_define(
    "count(Tensor x) -> SymInt",
    lambda x: int((x > 0).sum()),
    lambda x: torch.library.get_ctx().new_dynamic_size(),
)
_define("width(Tensor x) -> int", lambda x: x.shape[-1], lambda x: x.shape[-1])


def _filled(h: Tensor) -> Tensor:
    empty = torch.zeros_like(h)
    torch.ops.fasp_fx_read.fill_(empty, h)
    return empty


COMPLEX: dict[str, Function] = {
    "pairs as complex numbers": lambda h: torch.view_as_real(_complex(h) * 1j).flatten(-2),
    "lengths of pairs": lambda h: _complex(h).abs().repeat(1, 1, 2),
    "mixed over tokens": lambda h: torch.fft.fft(h, dim=1).real,
    "filtered over tokens": lambda h: torch.fft.irfft(torch.fft.rfft(h, dim=1) * 0.5, n=h.shape[1], dim=1),
}
FUNCTIONS: dict[str, Function] = {
    # Reshapes that mix a dimension that varies from call to call with channels, and cuts by a size.
    "heads without the transpose": lambda h: h.reshape(h.shape[0], 3, -1, 4).transpose(1, 2).reshape(h.shape),
    "transposed and read as it was": lambda h: h.transpose(1, 2).reshape(h.shape),
    "time in the place of the batch": lambda h: h.transpose(0, 2).reshape(h.shape),
    "channels in the place of time": (
        lambda h: F.conv1d(h.view(h.shape[0], 12, -1), torch.ones(12, 1, 1).double(), groups=12).view(h.shape)
    ),
    "halves of a flattened sequence": lambda h: torch.cat(h.flatten(1).chunk(2, 1)[::-1], 1).view(h.shape),
    "the end of a flattened sequence": lambda h: h.flatten(1)[:, -12:].unsqueeze(1) + h,
    "the last of a flattened sequence": lambda h: h.flatten(1)[:, -1][:, None, None] + h,
    "the channel that the length says": lambda h: h * h[..., h.shape[1] - 1].unsqueeze(-1),
    "behind as many zeros as there are steps": lambda h: F.pad(h, (h.shape[1], 0))[..., :12],
    "as many channels as there are steps": lambda h: F.pad(h[..., : h.shape[1]], (0, 12))[..., :12],
    "as many heads as there are steps": (
        lambda h: h + h.unflatten(-1, (6, 2))[:, :, : h.shape[1], :].sum(-2).repeat(1, 1, 6)
    ),
    "repeated by the length, read crosswise": (
        lambda h: h.repeat(1, 1, h.shape[1]).view(*h.shape[:2], 12, h.shape[1]).sum(3)
    ),
    "blocks that a size deals out": _crosswise,
    # Reshapes that hold at every size leave channels free.
    "flattened and back": lambda h: F.relu(h.flatten(1)).view(h.shape),
    "flattened, turned and back": lambda h: h.flatten(1).flip(1).view(h.shape),
    "flattened behind its channels": (
        lambda h: F.relu(h.transpose(1, 2).flatten(1)).view(h.shape[0], 12, -1).transpose(1, 2)
    ),
    "rows of a product of sizes": lambda h: h.reshape(-1, h.shape[1] * h.shape[2]).view(h.shape),
    "tokens of all sequences": lambda h: F.relu(h.reshape(-1, 12)).view(h.shape),
    "repeated by the length": lambda h: h.repeat(1, 1, h.shape[1]).view(*h.shape[:2], h.shape[1], 12).sum(2),
    "halves in time": lambda h: torch.cat([h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :] * 2], 1),
    "twice in time": lambda h: torch.stack([h, h * 2], 2).flatten(1, 2)[:, : h.shape[1]],
    "pairs in time behind channels": (
        lambda h: (
            F.pad(h, (0, 0, 0, h.shape[1]))
            .transpose(1, 2)
            .view(-1, 12, h.shape[1], 2)
            .flip(3)
            .flatten(2)
            .transpose(1, 2)
        )
    ),
    "pairs in time, divided": (
        lambda h: F.pad(h, (0, 0, 0, h.shape[1])).transpose(1, 2).unflatten(2, (-1, 2)).sum(3).transpose(1, 2)
    ),
    "repeated to a given length": (
        lambda h: h.repeat_interleave(2, -1, output_size=24).unflatten(-1, (12, 2)).sum(-1)
    ),
    # Heads lose the same channels where an operator goes across them.
    "rolled across heads": across(lambda h: torch.roll(h, 1, -2)),
    "summed up across heads": across(lambda h: h.cumsum(-2)),
    "sorted across heads": across(lambda h: h.sort(-2)[0]),
    "transformed across heads": across(lambda h: torch.fft.fft(h, dim=-2).abs()),
    "summed up backwards across heads": across(lambda h: h.flip(-2).cumsum(-2).flip(-2)),
    "softmax across heads": across(lambda h: h.softmax(-2)),
    "centred across heads": across(lambda h: h - h.mean(-2, keepdim=True)),
    "heads that only move": across(lambda h: h.flip(-2)),
    # Operators of any return freeze what they are given; a width that the exporter writes out is the dense
    # one.
    "a number": lambda h: h.detach() * (1 + torch.ops.fasp_fx_read.count(h.detach())),
    "a number and a tensor": lambda h: torch.ops.fasp_fx_read.pair(h)[1],
    "nothing, written into an argument": _filled,
    "a list of tensors and a tensor": (
        lambda h: torch.ops.fasp_fx_read.several(h)[0][1] + torch.ops.fasp_fx_read.several(h)[1]
    ),
    "divided by a width": lambda h: h / torch.ops.fasp_fx_read.width(h),
    # An operator that is taken apart, and copies where no view can be (XLNet).
    "an outer product": (
        lambda h: h * torch.einsum("btc,cnd->btnd", h, torch.ones(12, 1, 12).to(h)).flatten(2)
    ),
    **{f"written {function.__name__}": function for function in IN_PLACE},
}


def between(function: Function) -> Make:
    return lambda: between_layers(function)


def _remembering(blocks: int, beside: bool) -> nn.Module:
    """Channels, or blocks of them, in an order that changes with each call: a buffer is no constant."""

    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x))
        moved = hidden.unflatten(-1, (blocks, -1))[..., self.order, :].flatten(-2)
        self.order.copy_(self.order.roll(1))
        return self.last(F.relu(self.second(hidden + moved if beside else moved)))

    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))
    return made(forward, order=order, **linear(first=(8, 12), second=(12, 5), last=(5, 4)))


# --- Two steps in time become one; how often they fit into the length is no business of the channels'.


def _merging(merge: Function) -> Make:
    return lambda: made(
        lambda m, x: m.down(merge(torch.relu(m.up(x)))), up=nn.Conv1d(4, 24, 1), down=nn.Conv1d(48, 3, 1)
    )


STEPS = {
    "steps merged by view": _merging(
        lambda h: h.view(h.shape[0], 24, h.shape[2] // 2, 2).permute(0, 1, 3, 2).flatten(1, 2)
    ),
    "steps merged by unflatten": _merging(
        lambda h: h.unflatten(2, (-1, 2)).permute(0, 1, 3, 2).flatten(1, 2)
    ),
    "steps merged, parts first": _merging(
        lambda h: h.view(h.shape[0], 24, h.shape[2] // 2, 2).permute(0, 3, 1, 2).reshape(h.shape[0], 48, -1)
    ),
    "steps merged by pixel_unshuffle": _merging(
        lambda h: F.pixel_unshuffle(torch.stack([h, -h], 2), 2)[:, ::2].flatten(2)
    ),
}

# --- Sequences whose length a weight fixes: tokens are features, and what is computed of their number is
# settled only afterwards. What takes some of five, and how many are left.

TAKEN: dict[str, tuple[Callable[[Tensor, int], Tensor], int]] = {
    "all but the last": (lambda x, count: x[:, : count - 1], 4),
    "the second half": (lambda x, count: x[:, count // 2 :], 3),
    "every second": (lambda x, count: x[:, :: count // 2], 3),
    "behind zeros": (lambda x, count: F.pad(x, (0, 0, count // 2, 0)), 7),
    "parts exchanged": (lambda x, count: torch.cat(x.split([count // 2, count - count // 2], 1)[::-1], 1), 5),
    "one in front": (lambda x, count: torch.cat([x[:, count - 2].unsqueeze(1), x], 1), 6),
}


def _taking(take: Callable[[Tensor, int], Tensor], left: int) -> nn.Module:
    """Of those that a layer makes, by the number of those of another input."""

    def forward(m: Any, x: Tensor, other: Tensor) -> Tensor:
        taken = take(m.down(F.gelu(m.up(other))).transpose(1, 2), x.shape[1]).transpose(1, 2)
        return m.last(m.down_again(F.gelu(m.up_again(taken))).transpose(1, 2) + m.own(x))

    sizes = {"up": (4, 7), "down": (7, 5), "up_again": (left, 4), "down_again": (4, 5), "own": (6, 8)}
    return made(forward, **linear(**sizes, last=(8, 3)))


def behind() -> nn.Module:
    """Reads channels, padded to an even number of tokens, in the order in which they lie."""

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = F.pad(m.up(x).transpose(1, 2), (0, x.shape[1] % 2))
        pairs = torch.einsum("bcpk,k->bcp", hidden.unflatten(2, (-1, 2)), torch.ones(2, dtype=x.dtype))
        return m.down(pairs.transpose(1, 2))

    return wide(forward, hidden=8)


def joined() -> nn.Module:
    """A projected input between two others, whose widths are fixed."""
    return made(
        lambda m, before, x, after: m.out(torch.cat([before, m.middle(x), after], dim=-1)),
        middle=nn.Linear(4, 6),
        out=nn.Sequential(nn.Linear(14, 8), nn.ReLU(), nn.Linear(8, 2)),
    )


def appended(last: bool) -> nn.Module:
    """A single channel is appended to others, and all of them are added to channels of another producer:
    dimensions of one position look like dimensions without channels.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        said = self.say(x).tanh()
        longer, more = torch.cat([said, self.one(said)], -1), self.more(x)
        return self.out((more + longer if last else longer + more).tanh())

    return made(forward, **linear(say=(4, 6), one=(6, 1), more=(4, 7), out=(7, 3)))


def only_matrix() -> nn.Module:
    """Two matrices stored side by side are contracted with what depends on the input, and added to two
    others; the last channel of the only matrix left proves nothing.
    """
    return made(
        lambda self, x: (
            torch.baddbmm(self.add, self.first.view(2, 2, 2), self.second + x).transpose(0, -1) @ self.out
        ),
        add=parameter(2, 2, 2),
        out=parameter(2, 2),
        first=parameter(2, 4),
        second=parameter(2, 2, 2),
    )


def _all_repeated(model: Any, x: Tensor) -> Tensor:
    """One sample, of whose rows others may go in each only while nobody makes one row of all."""
    columns = model.up(x).reshape(3, 4).transpose(0, 1)
    return model.down(columns.repeat_interleave(2))


ENTRIES: dict[str, Entry] = {
    **entries(LAYOUTS, rows(6)),
    "all repeated, column by column": Entry(
        lambda: made(_all_repeated, up=nn.Linear(5, 12), down=nn.Linear(24, 3)), (drawn((5,)),)
    ),
    **MIXERS,
    **entries({f"beside {name}": lambda own=own: _beside(*own) for name, own in BESIDE.items()}, MASKED),
    **entries({name: between(function) for name, function in FUNCTIONS.items()}, sequences(8)),
    **entries(
        {name: between(function) for name, function in COMPLEX.items()},
        sequences(8),
        invariants=("mask-exact", "nothing", "shapes", "rules", "restored"),
    ),
    "the one of a pair that data picks": Entry(
        between(lambda h: h * h.unflatten(-1, (6, 2))[..., (h.sum() > 0).long()].repeat(1, 1, 2)),
        sequences(8),
        since="2.13",
    ),
    **{
        f"an order of {blocks} that changes, {beside}": Entry(
            lambda own=(blocks, beside): _remembering(*own),
            sequences(8),
            times=2,
            slow=(blocks == 12) == beside,
        )
        for blocks in (12, 3)
        for beside in (False, True)
    },
    # an input lies beside channels
    "an input beside channels": Entry(
        lambda: made(
            lambda m, x: m.last(F.relu(m.second(torch.cat([x, F.relu(m.first(x))], -1)))),
            **linear(first=(8, 12), second=(20, 5), last=(5, 4)),
        ),
        sequences(8),
    ),
    **entries(STEPS, tuple(drawn((batch, 4, size)) for batch, size in ((2, 8), (3, 4), (3, 14), (3, 40)))),
    **{
        f"tokens taken, {name}": Entry(
            lambda own=own: _taking(*own), tuple(drawn((n, 5, 6), (n, 8, 4)) for n in (2, 3))
        )
        for name, own in TAKEN.items()
    },
    **{
        f"chunks, {length} of them": Entry(behind, sequences(6, (2, length), (3, length)))
        for length in (7, 8)
    },
    "inputs side by side": Entry(
        joined, tuple(drawn(*shapes) for shapes in ([(3, 4)] * 3, [(5, 4)] * 3, [(3, 5), (3, 4), (3, 3)]))
    ),
    # until one is left beside the appended one
    **{
        f"one channel appended, {last}": Entry(
            lambda last=last: appended(last), rows(4), invariants=("mask-exact", "steps")
        )
        for last in (False, True)
    },
    "the only matrix": Entry(only_matrix, (drawn(()), (torch.tensor(2.0),)), invariants=("mask-exact",)),
}
