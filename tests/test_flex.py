"""Flex attention: value channels and whole heads go, mask-exactly, unless the functions it is given tell the
heads apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import made
from oracle import TOLERANCE, assert_exact, assert_mask_exact, error
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from transformers import LlamaConfig, LlamaForCausalLM

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

OPERATOR = torch.ops.higher_order.flex_attention
HEADS, SHARED, WIDTH = 4, 2, 8
Function = Callable[..., Tensor]


def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def local_but_first(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (head == 0) | (query - key < 2)


class Attention(nn.Module):
    """Grouped-query attention with one of the usual functions.

    Args:
        score: ``None``, ``"cap"`` (every head alike) or ``"bias"`` (a table
            of relative positions for each head).
        mask: ``None``, or what is masked.
        mask_heads: whether the block mask has an entry for each head.
        more: return the log-sum-exp as well.
    """

    def __init__(
        self,
        score: str | None = None,
        mask: Function | None = None,
        mask_heads: bool = False,
        more: bool = False,
    ) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Linear(12, HEADS * WIDTH),
            nn.Linear(12, SHARED * WIDTH),
            nn.Linear(12, SHARED * WIDTH),
        )
        self.out = nn.Linear(HEADS * WIDTH, 12)
        self.register_buffer("bias", torch.randn(HEADS, 64))
        self.score, self.mask, self.mask_heads, self.more = score, mask, mask_heads, more

    def _scored(self) -> Function | None:
        if self.score == "bias":
            return lambda score, batch, head, query, key: score + self.bias[head, query - key + 32]
        if self.score == "cap":
            return lambda score, batch, head, query, key: 3.0 * torch.tanh(score / 3.0) + 0.1 * (query - key)
        return None

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).view(batch, length, -1, WIDTH).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        blocks = None
        if self.mask is not None:
            blocks = create_block_mask(
                self.mask, None, HEADS if self.mask_heads else None, length, length, device="cpu"
            )
        wanted = AuxRequest(lse=True) if self.more else None
        attended = flex_attention(
            q, k, v, score_mod=self._scored(), block_mask=blocks, enable_gqa=True, return_aux=wanted
        )
        attended, more = attended if self.more else (attended, None)
        result = self.out(attended.transpose(1, 2).reshape(batch, length, -1))
        return result if more is None else (result, more.lse)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bias by head": lambda: Attention("bias"),
    "mask by head": lambda: Attention(mask=local_but_first),
    "a block mask for each head": lambda: Attention(mask=causal, mask_heads=True),
    "capped and causal": lambda: Attention("cap", causal),
}
#: why whole heads stay
TOLD = {
    "bias by head": "'score_mod' of flex_attention tells positions along this dimension apart",
    "mask by head": "'block_mask' of flex_attention tells positions along this dimension apart",
    "a block mask for each head": (
        "'block_mask' of flex_attention tells positions along this dimension apart"
    ),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def example(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randn(batch, length, 12, generator=torch.Generator().manual_seed(batch))


def shown(analysis: fasp_fx.Analysis) -> set[str]:
    """The groups that the projections of attention take part in, as they print."""
    return {
        " ".join(str(group).split())
        for group in analysis.groups
        if any(slice_.dim == 0 and slice_.name[0] in "qkv" for slice_ in group.producers)
    }


@pytest.mark.parametrize("name", MODELS)
def test_value_channels_are_prunable_and_heads_where_they_are_alike(name: str) -> None:
    model, x = built(name), example()
    channels, heads = (fasp_fx.analyze(model, (x,), granularity=(kind,)) for kind in ("channel", "head"))
    assert shown(channels) == {
        "prunable 2 x 8 v.weight[0], v.bias[0] -> out.weight[1]",
        (
            "exempt 2 x 8 q.weight[0], q.bias[0], k.weight[0], k.bias[0] -> - (contracted between two"
            " activations by flex_attention)"
        ),
    }
    everything = "q.weight[0], q.bias[0], k.weight[0], k.bias[0], v.weight[0], v.bias[0] -> out.weight[1]"
    assert shown(heads) == {
        f"frozen 2 heads {everything} ({TOLD[name]})" if name in TOLD else f"prunable 2 heads {everything}"
    }
    if name in TOLD:
        with pytest.raises(fasp_fx.errors.NothingPrunableError, match=TOLD[name]):
            fasp_fx.prune(model, (x,), granularity=("head",), score="random", restore=None)


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        ("bias by head", "channel"),
        ("capped and causal", "channel"),
        ("capped and causal", "head"),
    ],
)
def test_narrower_values_and_fewer_heads_are_mask_exact(name: str, granularity: str) -> None:
    model, x = built(name), example()
    result = fasp_fx.prune(
        model, (x,), granularity=(granularity,), sparsity=0.4, score="random", restore=None
    )
    (node,) = result.program.graph.find_nodes(op="call_function", target=OPERATOR)
    query, key, value = (argument.meta["val"].shape for argument in node.args[:3])
    fewer = granularity == "head"
    assert (query[1], key[1], value[1]) == ((2, 1, 1) if fewer else (HEADS, SHARED, SHARED))
    assert (value[-1] < query[-1] == WIDTH) != fewer
    assert node.args[5] == pytest.approx(1 / math.sqrt(WIDTH))
    for given in (example(), example(3, 9)):  # the lengths of a causal mask vary as others do
        assert_mask_exact(model, result, lambda module, given=given: module(given))


def test_narrower_queries_and_keys_are_exact_where_they_are_asked_for() -> None:
    model, x = built("capped and causal"), example()
    options: dict[str, Any] = {"include": ("exempt",), "score": "random", "restore": None}
    result = fasp_fx.prune(model, (x,), sparsity=0.4, **options)
    assert result.module.get_parameter("q.weight").shape[0] < HEADS * WIDTH
    assert_exact(model, result, (example(),), (example(3, 9),), producers=True)


def test_what_attention_returns_besides() -> None:
    """The log-sum-exp depends on no value channel; being an output, it holds on to the heads."""
    torch.manual_seed(0)
    model, x = Attention("cap", causal, more=True).eval(), example()
    result = fasp_fx.prune(model, (x,), sparsity=0.2, score="random", restore=None)
    heads = fasp_fx.analyze(model, (x,), granularity=("head",))
    assert_mask_exact(model, result, lambda module: module(x)[0])
    with torch.no_grad():
        found, expected = result.module(x)[1], model(x)[1]
    assert found.shape == (2, HEADS, 6)
    assert error(found, expected) <= TOLERANCE
    (group,) = [group for group in heads.groups if group.granularity == "head"]
    assert "reaches output" in (group.reason or "")


def turned(self: Any, x: Tensor) -> Tensor:
    """Something stands between projections and attention, as rotary embeddings do: inductor fails where
    nothing does, of the dense model as well.
    """
    batch, length, _ = x.shape
    q, k, v = (
        torch.tanh(layer(x).view(batch, length, -1, WIDTH).transpose(1, 2))
        for layer in (self.q, self.k, self.v)
    )

    def score(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + self.bias[head, query - key + 32]

    attended = flex_attention(q, k, v, score_mod=score, enable_gqa=True)
    return self.out(attended.transpose(1, 2).reshape(batch, length, -1))


def test_narrower_values_compile_and_a_backend_leaves_them_whole() -> None:
    """Inductor's kernel takes values narrower than queries, so nothing need be padded."""
    torch.manual_seed(0)
    sizes = {"q": (12, HEADS * WIDTH), "k": (12, SHARED * WIDTH), "v": (12, SHARED * WIDTH)}
    layers = {name: nn.Linear(*size) for name, size in {**sizes, "out": (HEADS * WIDTH, 12)}.items()}
    model = made(turned, bias=torch.randn(HEADS, 64), **layers)
    result = fasp_fx.prune(model, (example(),), sparsity=0.2, score="random", restore=None)
    pads = torch.ops.aten.constant_pad_nd.default
    assert not result.program.graph.find_nodes(op="call_function", target=pads)
    compiled = torch.compile(model, backend=fasp_fx.backend(result.plan, inner="aot_eager"))
    with torch.no_grad(), pytest.warns(fasp_fx.errors.PartialPlanWarning, match="calls flex_attention"):
        assert error(compiled(example()), model(example())) <= TOLERANCE
    with torch.no_grad():
        compiled = torch.compile(result.module, fullgraph=True)(example())
        assert error(compiled, result.module(example())) <= TOLERANCE


# --- transformers


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["channel", "head"])
def test_llama(granularity: str) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "flex_attention"}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()
    inputs = {"input_ids": torch.randint(0, 50, (2, 10)), "use_cache": False}
    asked: dict[str, Any] = {
        "granularity": tuple({granularity, "channel"}),
        "score": "random",
        "restore": None,
    }
    result = fasp_fx.prune(model, (), inputs, sparsity=0.4, **asked)
    assert OPERATOR in {node.target for node in result.program.graph.nodes}
    for shape in ((2, 10), (3, 7)):
        given = torch.randint(0, 50, shape)
        with torch.compiler.set_stance("force_eager"):
            # Transformers compiles attention whenever the dense model is called.
            assert_mask_exact(
                model, result, lambda module, given=given: module(input_ids=given, use_cache=False)["logits"]
            )


# --- saves


@torch.no_grad()
def test_it_is_saved(tmp_path: Path) -> None:
    result = fasp_fx.prune(
        built("capped and causal"), (example(),), sparsity=0.2, score="random", restore=None
    )
    loaded = fasp_fx.load(result.save(tmp_path / "out"))
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(loaded.module(example()), result.module(example()))
