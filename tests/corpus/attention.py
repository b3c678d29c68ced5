"""Attention of every make: between two sequences, with heads folded into the batch, of fused weights of low
rank; and models of transformers with whole heads, queries and keys, or the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from models import ZOO, linear, made, parameter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from . import Args, Entry, Keywords, Make, drawn, entries, rows, sequences

WIDTH, HEADS = 16, 4
EXEMPT: dict[str, Any] = {"options": {"include": ("exempt",)}, "masking": {"producers": True}}
STREAM: dict[str, Any] = {"options": {"include": ("approximate",)}, "masking": {"producers": True}}


def cross(several: bool = False) -> nn.Module:
    """PyTorch's own attention between two sequences, which takes one packed weight apart before it projects
    with it; queries of one sequence, keys and values of another, or of two others.
    """

    def forward(m: Any, x: Tensor, memory: Tensor) -> Tensor:
        memory = m.second(memory)
        values = memory.flip(1) if several else memory
        return m.last(m.attention(m.first(x), memory, values, need_weights=False)[0].tanh())

    return made(forward, attention=nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), **ends())


def decoder() -> nn.Module:
    """A decoder layer over a memory."""
    return made(
        lambda m, x, memory: m.last(m.decoder(m.first(x), m.second(memory))),
        decoder=nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 24, batch_first=True), 1),
        **ends(),
    )


def ends() -> dict[str, nn.Module]:
    return linear(first=(6, WIDTH), second=(6, WIDTH), last=(WIDTH, 3))


def queries(causal: bool) -> nn.Module:
    """Queries of the model's own, whose positions a linear layer reads; causal, each sees keys up to its own
    number, and they stay.
    """

    def forward(m: Any, x: Tensor) -> Tensor:
        latents = m.latents.expand(x.shape[0], -1, -1)
        mixed = F.scaled_dot_product_attention(latents, m.key(x), m.value(x), is_causal=causal)
        return m.last(mixed.transpose(1, 2))

    return made(forward, latents=parameter(WIDTH, 4), **linear(key=(5, 4), value=(5, 4), last=(WIDTH, 3)))


def attended(inside: Callable[[Tensor], Tensor] = torch.relu, **options: Any) -> nn.Module:
    """Attention between two layers: its heads are folded into the batch, a dimension whose size varies."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.into(x)
        return m.out(inside(m.up(m.attention(h, h.relu(), h)[0])))

    attention = nn.MultiheadAttention(12, 3, batch_first=True, **options)
    return made(forward, attention=attention, **linear(into=(8, 12), up=(12, 16), out=(16, 8)))


# --- models whose results are pruned again


def low_rank() -> nn.Module:
    """A weight that is a product of two, and is folded."""
    return made(
        lambda self, x: F.linear(F.gelu(self.up(x)), self.u @ self.v),
        u=parameter(8, 28, scale=0.4),
        v=parameter(28, 32, scale=0.4),
        up=nn.Linear(8, 32),
    )


def heads_of_low_rank(fused: bool = True) -> nn.Module:
    """Queries, keys and values of one product (of low rank), head by head: split, and values padded to the
    width of the queries.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        projected = F.linear(x, self.u @ self.v if fused else self.u)
        q, k, v = projected.view(*x.shape[:2], 4, 3, 8).permute(3, 0, 2, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))

    return made(
        forward, u=parameter(96, 32, scale=0.3), v=parameter(32, 32, scale=0.3), out=nn.Linear(32, 32)
    )


def image() -> nn.Module:
    """Convolutions, one of them depthwise, flattened into a linear layer."""
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 12, 3, padding=1)),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(1),
        nn.Linear(16 * 16, 5),
    )


def gated(self: Any, x: Tensor) -> Tensor:
    """Gates and what they gate are every other row of one weight."""
    return self.down(F.silu((hidden := self.up(x))[..., ::2]) * hidden[..., 1::2])


AGAIN: dict[str, Any] = {"invariants": ("steps",), "std": None}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def of_zoo(name: str, slow: bool = False, **fields: Any) -> Entry:
    """A model of the zoo with other groups."""
    calls = tuple((Keywords(ZOO[name].example(*size)),) for size in ((2, 7), (3, 11)))
    return Entry(ZOO[name].build, calls, std=None, double=False, slow=slow, **fields)


def vit() -> nn.Module:
    return hf.ViTModel(hf.ViTConfig(image_size=16, patch_size=4, **SMALL))


BOTH_ENDS: tuple[Args, ...] = (drawn((2, 5, 6), (2, 7, 6)), drawn((3, 4, 6), (3, 8, 6)))
CROSS: dict[str, Make] = {
    "keys and values of one": cross,
    "keys and values of two": lambda: cross(several=True),
    "decoder": decoder,
}
FOLDED = sequences(8, (4, 5), (1, 7), (2, 7), (8, 7))
MASKED_HEADS: dict[str, Any] = {"options": {"granularity": ("head",)}}

ENTRIES: dict[str, Entry] = {
    **entries(CROSS, BOTH_ENDS),
    **{
        f"{name}, heads": Entry(make, BOTH_ENDS, slow=name == "decoder", **MASKED_HEADS)
        for name, make in CROSS.items()
    },
    # norms go on over the dense count
    "decoder, streams too": Entry(decoder, BOTH_ENDS, slow=True, **STREAM),
    "keys and values of one, queries too": Entry(cross, BOTH_ENDS, **EXEMPT),
    **{
        f"queries of its own, causal {causal}": Entry(
            lambda causal=causal: queries(causal), sequences(5, (2, 4), (2, 2), (2, 20))
        )
        for causal in (True, False)
    },
    "folded heads": Entry(attended, FOLDED, **EXEMPT),
    "folded heads, a row behind the keys": Entry(
        lambda: attended(add_bias_kv=True, add_zero_attn=True), FOLDED, **EXEMPT
    ),
    "folded heads, one sample": Entry(attended, FOLDED[1:], **EXEMPT),
    "low rank": Entry(low_rank, rows(8, 3, 7), **AGAIN),
    "heads of low rank": Entry(heads_of_low_rank, sequences(32, (2, 5), (1, 9)), **AGAIN),
    "heads, queries too": Entry(
        lambda: heads_of_low_rank(fused=False), sequences(32, (2, 5), (3, 4)), **AGAIN, **EXEMPT
    ),
    "image": Entry(image, tuple(drawn((n, 3, 8, 8)) for n in (2, 5)), **AGAIN),
    "gated": Entry(lambda: made(gated, **linear(up=(8, 48), down=(24, 8))), rows(8, 3, 6), **AGAIN),
    "llama_gqa, heads": of_zoo("llama_gqa", **MASKED_HEADS),
    "bert, heads": of_zoo("bert", slow=True, **MASKED_HEADS),
    "vit, heads": Entry(
        vit,
        tuple((Keywords(pixel_values=drawn((n, 3, 16, 16))[0]),) for n in (2, 3)),
        std=0.2,
        double=False,
        **MASKED_HEADS,
    ),
    **{
        f"{name}, the residual stream": of_zoo(name, name not in ("llama_gqa", "gpt2"), **STREAM)
        for name in ("llama_gqa", "gpt2", "opt", "gemma2")
    },
    "llama_gqa, queries too": of_zoo("llama_gqa", **EXEMPT),
    "qwen3, queries too": of_zoo(
        "qwen3", True, options={"include": ("exempt", "approximate")}, masking={"producers": True}
    ),
}
