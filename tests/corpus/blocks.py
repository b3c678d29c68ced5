"""Fused weights, mixtures of experts and residual blocks, of which channels, experts or whole blocks go."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as hf
from models import block, linear, made, parameter, wide
from oracle import zeroed
from torch import Tensor, nn
from torch.nn import functional as F

from . import Entry, Keywords, Make, drawn, entries, images, rows, sequences

# --- Fused weights are taken apart only where every token stays in its place at every size: not across
# windows, cuts, or an order of tokens.

Parts = tuple[Tensor, Tensor, Tensor]


def _unbound(fused: Tensor) -> Parts:
    """Queries, keys and values ``[batch, …, heads, tokens, width]`` of ``[batch, …, tokens, heads, 3,
    width]``.
    """
    q, k, v = fused.view(*fused.shape[:-1], 2, 3, 8).transpose(-4, -3).unbind(-2)
    return q, k, v


def _heads_last(fused: Tensor) -> Parts:
    q, k, v = fused.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    return q, k, v


#: in which tokens do not stay in their places; shifted by none where there are few, so that the small sizes
#: of the analysis do not show it
TORN: dict[str, Callable[[Tensor], Parts]] = {
    "windows": lambda fused: _unbound(fused.view(fused.shape[0], -1, 3, 48)),
    "windows in the batch": lambda fused: _unbound(fused.view(-1, 3, 48)),
    "all but the last": lambda fused: _unbound(fused[:, :-1]),
    "the first half": lambda fused: _unbound(fused[:, : fused.shape[1] // 2]),
    "across windows": (
        lambda fused: _unbound(fused.view(fused.shape[0], -1, 3, 48).transpose(1, 2).reshape(fused.shape))
    ),
    "backwards": lambda fused: _unbound(fused.flip(1)),
    "shifted": lambda fused: _unbound(F.pad(fused, (0, 0, fused.shape[1] // 4, -(fused.shape[1] // 4)))),
}
WHOLE: dict[str, Callable[[Tensor], Parts]] = {"whole": _unbound, "heads last": _heads_last}


def fused(
    layout: Callable[[Tensor], Parts] = _unbound, more: Callable[..., Any] = lambda m, x: (), **held: Any
) -> nn.Module:
    """Attention over what a layout makes of a fused projection, beside two layers that nothing keeps from
    being pruned; ``more`` is returned as well.
    """

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        mixed = F.scaled_dot_product_attention(*layout(m.project(m, x))).transpose(-3, -2).flatten(-2)
        return m.out(mixed if mixed.dim() == 3 else mixed.flatten(1, 2)), block(m, x), *more(m, x)

    return wide(
        forward, 8, 20, **{"project": lambda m, x: m.qkv(x), **linear(qkv=(8, 48), out=(16, 8)), **held}
    )


def _padded(m: Any, x: Tensor) -> Tensor:
    """Windows of 64 tokens, of which the example fills not one."""
    return m.qkv(F.pad(x, (0, 0, 0, -x.shape[1] % 64)))


def _turned(m: Any, x: Tensor) -> Tensor:
    """The weight is turned once, and met twice."""
    return x @ m.weight.t()


def _placed(m: Any, x: Tensor) -> Tensor:
    """So many tokens, each with a vector of its own, by which tokens are numbered as channels are."""
    return m.qkv(x + m.places)


def _rows() -> dict[str, Any]:
    return {"weight": parameter(48, 8), "second": nn.Linear(48, 8)}


#: models that keep a weight together where what it is made of is not for these rows alone, so that tied
#: weights would not stay tied, or a plan would name two weights by one name; and one that a graph stands
#: beside
FUSED: dict[str, Make] = {
    **{name: (lambda layout=layout: fused(layout)) for name, layout in {**TORN, **WHOLE}.items()},
    "lifted by one number": (
        lambda: fused(project=lambda m, x: m.qkv(x) + m.lift, lift=nn.Parameter(torch.ones(1)))
    ),
    "a bias shared": (
        lambda: fused(more=lambda m, x: (m.second(F.linear(x, m.weight, m.qkv.bias)),), **_rows())
    ),
    "a weight met twice": (
        lambda: fused(project=_turned, more=lambda m, x: (m.second(torch.relu(_turned(m, x))),), **_rows())
    ),
    "beside a graph": (
        lambda: fused(more=lambda m, x: (torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),))
    ),
}
FEW = ((2, 9), (3, 6), (1, 24))

# --- experts

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 96,
    "num_experts_per_tok": 2,
}
MIXTURES: dict[str, Make] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=4, **SMALL)),
    # torch's kernel, which others are not traced with
    "mixtral in bfloat16": lambda: MIXTURES["mixtral"]().bfloat16(),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(num_local_experts=4, head_dim=8, **SMALL)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(num_experts=4, moe_intermediate_size=24, head_dim=8, **SMALL)
    ),
}


def never_chosen(model: nn.Module, plan: Any) -> nn.Module:
    """The dense model with the consumers' columns zero and the routers' logits of experts that are gone at
    -inf.
    """
    masked = zeroed(model, plan)
    for part in (part for group in plan.groups if group.granularity == "expert" for part in group.producers):
        owner, _, name = part.name.rpartition(".")
        if name == "weight" and owner.rpartition(".")[2] in ("gate", "router"):
            _exclude(masked.get_submodule(owner), list(part.removed))
    return masked


def _exclude(router: nn.Module, gone: list[int]) -> None:
    """Let the logits of these experts be -inf, wherever the router computes them."""
    weight, linear_ = router.weight, F.linear
    forward = router.forward

    def patched(x: Tensor, other: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = linear_(x, other, bias)
        return logits.index_fill(-1, torch.tensor(gone), -math.inf) if other is weight else logits

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        F.linear = patched
        try:
            return forward(*args, **kwargs)
        finally:
            F.linear = linear_

    router.forward = wrapped  # type: ignore[method-assign]


def routed(spoil: Callable[[Tensor], Tensor]) -> nn.Module:
    """Experts weighed by a softmax, of which the forward makes something else as well."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        gates = spoil(m.router(h).softmax(-1))
        outputs = torch.bmm(torch.bmm(h.expand(4, -1, -1), m.up).relu(), m.down)
        return (outputs * gates.T[:, :, None]).sum(0)

    return made(
        forward, up=parameter(4, 8, 5), down=parameter(4, 5, 6), **linear(first=(6, 8), router=(8, 4))
    )


#: what a router may do; from "offsets added up" on, what keeps experts
ROUTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda gates: gates,
    "maximum": lambda gates: gates * gates.max(-1, keepdim=True).values,
    "added up": lambda gates: gates[:, None].expand(-1, 2, -1).sum(1),
    "offsets added up": lambda gates: (gates[:, None] + 0.1).sum(1),
    "their sum": lambda gates: gates.sum(-1, keepdim=True).expand(-1, 4) + 0 * gates,
    # an expert that is never chosen would still give something
    "offset": lambda gates: gates + 0.1,
    "spread": lambda gates: gates * gates.std(-1, keepdim=True),
    "number": lambda gates: gates * (1 + gates.argmax(-1, keepdim=True)),
    "table": lambda gates: gates * torch.arange(4.0, device=gates.device)[gates.argmax(-1)][:, None],
    "order": lambda gates: gates[:, [1, 0, 3, 2]],
}


def soft(m: Any, x: Tensor) -> Tensor:
    """A soft mixture: every expert computes on slots, which are means of all tokens by one softmax of the
    logits, over tokens; by another, over all slots, their results are handed back. Experts compete only in
    the latter.
    """
    logits = torch.einsum("bnd,des->bnes", x, m.phi)
    competing = logits.index_fill(2, m.gone, -math.inf) if len(m.gone) else logits
    slots = torch.einsum("bnes,bnd->besd", logits.softmax(1), x)
    hidden = torch.relu(torch.einsum("besd,edh->besh", slots, m.up) + m.bias)
    outputs = torch.einsum("besh,ehd->besd", hidden, m.down)
    return torch.einsum("bnes,besd->bnd", competing.flatten(2).softmax(-1).view_as(logits), outputs)


def _out_of_competition(model: Any, plan: Any) -> nn.Module:
    masked: Any = zeroed(model, plan)
    lost = [part.removed for group in plan.groups for part in group.producers if part.name == "phi"]
    masked.gone = torch.tensor([*itertools.chain(*lost)], dtype=torch.long)
    return masked


def experts(width: int) -> nn.Module:
    """Three experts, all of them asked, each of which reads ``width`` channels."""
    return made(
        lambda self, x: self.out(
            torch.bmm(torch.bmm(self.into(x).expand(3, -1, -1), self.up).tanh(), self.down).sum(0)
        ),
        up=parameter(3, width, 8),
        down=parameter(3, 8, 4),
        **linear(into=(5, width), out=(4, 3)),
    )


BOTH: dict[str, Any] = {"options": {"granularity": ("channel", "expert")}, "reference": never_chosen}
ALONE: dict[str, Any] = {"options": {"granularity": ("expert",)}, "reference": never_chosen}


def _tokens(batch: int, length: int) -> tuple[Keywords]:
    generator = torch.Generator().manual_seed(batch)
    return (Keywords(input_ids=torch.randint(0, 96, (batch, length), generator=generator), use_cache=False),)


# --- whole residual blocks

WIDE = 12
DEPTH: dict[str, Any] = {"options": {"include": ("depth",), "granularity": ("channel", "head")}}


def spaced() -> nn.Module:
    """What often stands between a block and the sum."""
    return made(lambda m, x: m.norm(m.drop(x)) * 0.7, drop=nn.Dropout(0.1), norm=nn.LayerNorm(WIDE))


def beside(gain: bool) -> dict[str, nn.Module]:
    return {"norm": nn.LayerNorm(WIDE), "gain": spaced() if gain else nn.Identity()}


def feed_forward(bias: bool, gain: bool) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        return x + m.gain(m.down(F.silu(m.gate(y)) * m.up(y)))

    layers = linear(gate=(WIDE, 20), up=(WIDE, 20))
    return made(forward, **beside(gain), **layers, down=nn.Linear(20, WIDE, bias=bias))


def attention(bias: bool, gain: bool) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(x)
        parts = (project(y).unflatten(-1, (3, 4)).transpose(1, 2) for project in (m.query, m.key, m.value))
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(x.shape)
        return m.gain(m.out(mixed)) + x

    layers = linear(query=(WIDE, WIDE), key=(WIDE, WIDE), value=(WIDE, WIDE))
    return made(forward, **beside(gain), **layers, out=nn.Linear(WIDE, WIDE, bias=bias))


Kind = tuple[Callable[[bool, bool], nn.Module], bool, bool]


def residual(kinds: Sequence[Kind]) -> nn.Module:
    blocks = nn.Sequential(*(kind(bias, gain) for kind, bias, gain in kinds))
    first, last = nn.Linear(5, WIDE), nn.Linear(WIDE, 4)
    return made(lambda m, x: m.last(m.blocks(m.first(x))), first=first, last=last, blocks=blocks)


def convolutions() -> nn.Module:
    """A residual network with batch norms, one of which stands between a block and the sum."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        for index, (inner, outer) in enumerate(zip(m.inner, m.outer, strict=True)):
            hidden = torch.relu(m.norms[2 * index](inner(x)))
            x = torch.relu(m.norms[2 * index + 1](outer(hidden)) + x)
        return m.last(x)

    norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (12, 8, 12, 8))
    inner, outer = (
        nn.ModuleList(nn.Conv2d(*size, 3, padding=1, bias=bias) for bias in (True, False))
        for size in ((8, 12), (12, 8))
    )
    first, last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
    return made(forward, first=first, inner=inner, outer=outer, norms=norms, last=last)


def served() -> nn.Module:
    """Two blocks that read the same, which is made with random numbers, and have biases that are computed."""

    def forward(m: Any, x: Tensor) -> Tensor:
        both = torch.tanh(x) + torch.rand_like(x)
        for up, down in zip(m.ups, m.downs, strict=True):
            x = x + F.linear(torch.relu(up(both)), down.weight, 2 * down.bias + x.mean((0, 1)))
        return m.last(x + torch.rand_like(x))

    ups, downs = (nn.ModuleList(nn.Linear(*sizes) for _ in range(2)) for sizes in ((WIDE, 20), (20, WIDE)))
    return made(forward, ups=ups, downs=downs, last=nn.Linear(WIDE, 4))


def again(m: Any, x: Tensor) -> Tensor:
    """What the block is added to meets it once more before the sum that all ends in."""
    x = torch.tanh(x)
    y = block(m, x)
    return (x + y) * y + x


def unbatched(dims: int) -> nn.Module:
    """Convolutions of one image, whose first dimension is that of the channels."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return x + m.outer(torch.relu(m.inner(x)))

    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return made(forward, first=kind(3, 8, 1), inner=kind(8, 12, 3, padding=1), outer=kind(12, 8, 1))


def laid(bias: bool, expanded: bool) -> nn.Module:
    """A view of a sum of values of which only the block lies in memory as the view has it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        start = m.first(x.transpose(0, 1)).transpose(0, 1)
        if expanded:
            start = m.first(x)[:, :1].expand(x.shape)
        return (block(m, x) + start).view(-1, WIDE)

    return wide(forward, WIDE, 20, down=nn.Linear(20, WIDE, bias=bias), first=nn.Linear(WIDE, WIDE))


def handed(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs that the caller may write into."""
    x = x.view(-1, WIDE)
    x = x + block(m, x)
    y = torch.tanh(x)
    return y, (y + block(m, y)).view(-1)


def _plain(forward: Callable[..., Any]) -> Make:
    return lambda: wide(forward, WIDE, 20, down=nn.Linear(20, WIDE, bias=False))


#: blocks that no identity can stand for: something of them stays
WAYS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "added to nothing": lambda m, x, hidden: m.other(m.down(hidden)),
    "read elsewhere as well": (lambda m, x, hidden: (lambda sum: m.other(x + sum) * sum)(m.down(hidden))),
    "half of it from elsewhere": lambda m, x, hidden: (
        x + m.down(torch.cat([hidden[..., :8], m.other(x)], -1))
    ),
    "a weight between the two": lambda m, x, hidden: x + m.down(hidden * m.table.sum() * m.other(x).mean()),
    "a layer before the sum": (
        lambda m, x, hidden: torch.tanh(m.other(x) + m.mix(m.down(hidden))) @ m.table[:WIDE]
    ),
}


def _kept(way: Callable[[Any, Tensor, Tensor], Tensor]) -> nn.Module:
    return wide(
        lambda m, x: way(m, x, torch.relu(m.up(x))),
        WIDE,
        20,
        table=parameter(20, 20),
        **linear(other=(WIDE, WIDE), mix=(WIDE, WIDE)),
    )


ROWS = sequences(WIDE, (4, 3), (8, 3))
BLOCKS: dict[str, Entry] = {
    **entries(
        {
            f"{kind.__name__}, {bias}, {gain}": (lambda own=(kind, bias, gain): residual([own]))
            for kind in (feed_forward, attention)
            for bias, gain in ((True, False), (False, True))
        },
        sequences(5, (2, 3), (4, 6)),
        **DEPTH,
    ),
    "three blocks": Entry(
        lambda: residual([(feed_forward, False, False), (attention, True, True), (feed_forward, True, True)]),
        sequences(5, (2, 3), (4, 6)),
        **DEPTH,
    ),
    "a residual network": Entry(convolutions, images(3, (2, 9, 9), (4, 9, 9)), **DEPTH),
    "random numbers": Entry(served, ROWS, **DEPTH),
    "read twice before its sum": Entry(_plain(again), ROWS, **DEPTH),
    **{
        f"no batch, {dims}d": Entry(lambda dims=dims: unbatched(dims), (drawn((3, *[8] * dims)),), **DEPTH)
        for dims in (1, 2, 3)
    },
    **{
        f"laid out, {own}": Entry(lambda own=own: laid(*own), ROWS, **DEPTH)
        for own in itertools.product([False, True], repeat=2)
    },
    "handed out": Entry(_plain(handed), ROWS, **DEPTH),
    **{f"kept, {name}": Entry(lambda way=way: _kept(way), ROWS, **DEPTH) for name, way in WAYS.items()},
}
ENTRIES: dict[str, Entry] = {
    **entries(FUSED, sequences(8, *FEW)),
    "windows longer than the example": Entry(
        lambda: fused(lambda qkv: _unbound(qkv.view(qkv.shape[0], -1, 64, 48)), project=_padded),
        sequences(8, (2, 9), (2, 63), (2, 65), (1, 130)),
    ),
    **{
        f"{name}, placed": Entry(
            lambda layout=layout: fused(layout, project=_placed, places=parameter(9, 8)),
            sequences(8, (2, 9), (3, 9), (1, 9)),
        )
        for name, layout in WHOLE.items()
    },
    **{
        name: Entry(
            make,
            (_tokens(2, 7), _tokens(3, 9)),
            double=False,
            slow=name in ("gpt_oss", "qwen3_moe"),
            **BOTH,
        )
        for name, make in MIXTURES.items()
    },
    **{
        f"router, {name}": Entry(lambda spoil=spoil: routed(spoil), rows(6, 5, 8), **ALONE)
        for name, spoil in ROUTERS.items()
    },
    "soft mixture": Entry(
        lambda: made(
            soft,
            phi=parameter(8, 4, 2),
            gone=torch.tensor([], dtype=torch.long),
            up=parameter(4, 8, 12),
            bias=parameter(4, 1, 12),
            down=parameter(4, 12, 8),
        ),
        sequences(8, (2, 5), (3, 7)),
        {"granularity": ("expert",), "include": ("exempt",)},
        std=None,
        reference=_out_of_competition,
    ),
    **{
        f"{width} channels for each expert": Entry(
            lambda width=width: experts(width), rows(5, 6, 9), invariants=("steps",)
        )
        for width in (1, 2)
    },
    **BLOCKS,
}
