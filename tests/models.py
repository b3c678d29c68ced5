"""Small models of many kinds: made of a forward and of what it reads, of transformers, by a specification,
and in folders.

Weights of the zoo are scaled up and biases and norm weights randomised, so that outputs are far from zero,
every term matters and a wrong channel shows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from fasp_fx.testing.specs import Attention, Shape


def made(forward: Callable[..., Any], **held: Any) -> nn.Module:
    """A module in evaluation mode with this forward, which gets the module first.

    Args:
        held: modules and parameters; other tensors are buffers.
    """
    # Of a name by which nobody finds the class, so that it is equal to itself alone.
    model: nn.Module = type("<made>", (nn.Module,), {"forward": forward})()
    for name, value in held.items():
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            model.register_buffer(name, value)
        else:
            setattr(model, name, value)
    return model.eval()


def wide(forward: Callable[..., Any], size: int = 6, hidden: int = 24, **held: Any) -> nn.Module:
    """The same with a layer ``up`` to hidden channels and a layer ``down`` back."""
    return made(forward, **{"up": nn.Linear(size, hidden), "down": nn.Linear(hidden, size), **held})


def block(model: Any, x: Tensor) -> Tensor:
    """What such a model computes at the least."""
    return model.down(torch.relu(model.up(x)))


def linear(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    """Linear layers by their names."""
    return {name: nn.Linear(*size) for name, size in sizes.items()}


def stack(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).eval()


def parameter(*shape: int, scale: float = 1.0, **options: Any) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, **options) * scale)


def randomise(module: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Draw every parameter anew: matrices from N(0, std²), biases too, norm weights around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(noise + 1 if is_scale else noise)
    return module.eval()


def between_layers(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """A function of twelve channels between two linear layers; what follows can be pruned whatever becomes of
    it.
    """
    return made(
        lambda m, x: m.last(F.relu(m.third(m.second(m.function(F.relu(m.first(x))))))),
        **linear(first=(8, 12), second=(12, 5), third=(5, 16), last=(16, 4)),
        function=function,
    )


class Vectors(nn.Module):
    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 24), nn.Linear(24, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


IDS = torch.arange(10).reshape(2, 5)
X = torch.linspace(-1, 1, 18).reshape(3, 6)
BATCH = torch.linspace(-2, 2, 240).reshape(40, 6).sin()


# --- of transformers

VOCABULARY = 96
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}


@dataclass(frozen=True)
class Entry:
    """One model of the zoo: how to build it, and the names of the arguments that stay constant."""

    name: str
    make: Callable[[], nn.Module]
    constants: tuple[tuple[str, Any], ...] = (("use_cache", False),)

    def build(self, seed: int = 0) -> nn.Module:
        """A fresh model; equal seeds give equal weights."""
        return randomise(self.make(), seed)

    def inputs(self, batch: int, tokens: int, seed: int = 1) -> dict[str, Tensor]:
        """Random token numbers, the only tensor input."""
        generator = torch.Generator().manual_seed(seed)
        return {"input_ids": torch.randint(0, VOCABULARY, (batch, tokens), generator=generator)}

    def example(self, batch: int = 2, tokens: int = 7) -> dict[str, Any]:
        """Keyword arguments for a capture."""
        return {**self.inputs(batch, tokens), **dict(self.constants)}


def _opt() -> nn.Module:
    return hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=64,
            ffn_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            word_embed_proj_dim=64,
        )
    )


def _falcon(**options: Any) -> nn.Module:
    return hf.FalconForCausalLM(
        hf.FalconConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY, **options
        )
    )


ZOO: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("llama_gqa", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **_SMALL))),
        Entry(
            "llama_mha",
            lambda: hf.LlamaForCausalLM(
                hf.LlamaConfig(num_key_value_heads=4, tie_word_embeddings=True, **_SMALL)
            ),
        ),
        Entry("opt", _opt),
        Entry(
            "gpt2",
            lambda: hf.GPT2LMHeadModel(
                hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64)
            ),
        ),
        Entry("gpt_neox", lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SMALL))),
        Entry(
            "phi3", lambda: hf.Phi3ForCausalLM(hf.Phi3Config(num_key_value_heads=2, pad_token_id=0, **_SMALL))
        ),
        Entry(
            "qwen3", lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(num_key_value_heads=2, head_dim=16, **_SMALL))
        ),
        Entry(
            "gemma2",
            lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(num_key_value_heads=2, head_dim=16, **_SMALL)),
        ),
        Entry("mistral", lambda: hf.MistralForCausalLM(hf.MistralConfig(num_key_value_heads=2, **_SMALL))),
        Entry("falcon_mqa", lambda: _falcon()),
        Entry("falcon_new", lambda: _falcon(num_kv_heads=2, new_decoder_architecture=True)),
        Entry(
            "bloom",
            lambda: hf.BloomForCausalLM(
                hf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCABULARY)
            ),
        ),
        Entry("bert", lambda: hf.BertModel(hf.BertConfig(**_SMALL)), constants=()),
    )
}


def two_layers() -> nn.Module:
    """Linear, GELU, linear: the smallest model with a prunable group."""
    return made(lambda m, x: m.second(F.gelu(m.first(x))), **linear(first=(12, 20), second=(20, 12)))


# --- decoders in plain torch, made to a specification

LETTERS = 11


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


def build(spec: Spec, seed: int = 0) -> nn.Module:
    """The decoder of a specification, with random weights large enough that every channel shows in the
    output.
    """
    decoder = made(
        lambda m, tokens: m.head(m.norm(m.blocks(m.embed(tokens)))),
        embed=nn.Embedding(LETTERS, spec.hidden),
        blocks=nn.Sequential(*(Block(spec) for _ in range(spec.layers))),
        norm=nn.LayerNorm(spec.hidden),
        head=nn.Linear(spec.hidden, LETTERS, bias=False),
    )
    return randomise(decoder, seed, std=0.7)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random input of a decoder."""
    return torch.randint(0, LETTERS, (batch, length), generator=torch.Generator().manual_seed(seed))


def make_model(folder: Path, *, layers: int = 2) -> None:
    """Write both to a new folder; the model has 128 positions."""
    vocabulary = {
        "<s>": 0,
        "</s>": 1,
        **{
            letter: index + 2
            for index, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        },
    }
    bytes_ = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    bytes_.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = tokenizers.decoders.ByteLevel()
    hf.PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    hf.LlamaForCausalLM(config).save_pretrained(folder)
