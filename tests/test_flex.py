"""Flex attention as a kernel: what a smaller graph gives it, compiled and behind a backend. Which of its
channels and heads go is in corpus/layers.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from corpus.layers import FLEXIBLE, HEADS, SHARED, WIDTH, by_head, flexible
from oracle import TOLERANCE, assert_mask_exact, error
from transformers import LlamaConfig, LlamaForCausalLM

import fasp_fx

OPERATOR = torch.ops.higher_order.flex_attention
QUICK: dict[str, Any] = {"score": "random", "restore": None}
X = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("granularity", ["channel", "head"])
def test_values_are_narrower_or_heads_fewer_and_the_scale_stays(granularity: str) -> None:
    model = FLEXIBLE["capped and causal"]()
    result = fasp_fx.prune(model, (X,), granularity=(granularity,), sparsity=0.4, **QUICK)
    (node,) = result.program.graph.find_nodes(op="call_function", target=OPERATOR)
    query, key, value = (argument.meta["val"].shape for argument in node.args[:3])
    fewer = granularity == "head"
    assert (query[1], key[1], value[1]) == ((2, 1, 1) if fewer else (HEADS, SHARED, SHARED))
    assert (value[-1] < query[-1] == WIDTH) != fewer
    assert node.args[5] == pytest.approx(1 / math.sqrt(WIDTH))


def test_narrower_values_compile_and_a_backend_leaves_them_whole() -> None:
    """Inductor's kernel takes values narrower than queries, so nothing need be padded.

    Something stands between projections and attention: inductor fails where nothing does, of the dense model
    as well.
    """
    torch.manual_seed(0)
    model = flexible(by_head, turn=torch.tanh)
    result = fasp_fx.prune(model, (X,), sparsity=0.2, **QUICK)
    pads = torch.ops.aten.constant_pad_nd.default
    assert not result.program.graph.find_nodes(op="call_function", target=pads)
    compiled = torch.compile(model, backend=fasp_fx.backend(result.plan, inner="aot_eager"))
    with torch.no_grad(), pytest.warns(fasp_fx.PartialPlanWarning, match="calls flex_attention"):
        assert error(compiled(X), model(X)) <= TOLERANCE
    with torch.no_grad():
        compiled = torch.compile(result.module, fullgraph=True)(X)
        assert error(compiled, result.module(X)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["channel", "head"])
def test_llama(granularity: str) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "flex_attention"}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()
    inputs = {"input_ids": torch.randint(0, 50, (2, 10)), "use_cache": False}
    asked = {"granularity": tuple({granularity, "channel"}), **QUICK}
    result = fasp_fx.prune(model, (), inputs, sparsity=0.4, **asked)
    assert OPERATOR in {node.target for node in result.program.graph.nodes}
    for shape in ((2, 10), (3, 7)):
        ids = torch.randint(0, 50, shape)
        # Transformers compiles attention whenever the dense model is called.
        with torch.compiler.set_stance("force_eager"):
            assert_mask_exact(
                model, result, lambda module, ids=ids: module(input_ids=ids, use_cache=False)["logits"]
            )
