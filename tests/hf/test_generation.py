"""Token for token what the masked dense Hugging Face model generates.

Every model of the issue in every way of generating: ``FASP_FX_PROFILE=slow pytest
tests/hf/test_generation.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generators import TOKENS, Case, dense, expected, pruned
from oracle import masked, removed_columns

from fasp_fx import hf
from fasp_fx.base import CACHE

CASES = [Case(batch, beams) for batch in (1, 4) for beams in (1, 3)]
NAMES = ("llama_gqa", "gpt2", "opt", "qwen3", "gemma2", "t5")
#: what runs in every profile
FAST = {*(("llama_gqa", case) for case in CASES), ("gpt2", Case(4, 1))}


def _marked(name: str, case: Case) -> Any:
    return pytest.param(
        name,
        case,
        marks=() if (name, case) in FAST else pytest.mark.slow,
        id=f"{name}-batch{case.batch}-beams{case.beams}",
    )


@pytest.mark.parametrize(("name", "case"), [_marked(name, case) for name in NAMES for case in CASES])
def test_same_tokens_as_the_masked_dense_model(name: str, case: Case) -> None:
    wanted = expected(name, case)
    assert torch.equal(case.run(pruned(name).model, name), wanted)
    if case.beams == 1:
        assert wanted.shape[1] >= TOKENS
        assert not torch.equal(wanted, case.run(dense(name), name)), (
            "pruning changes nothing that can be seen"
        )


@pytest.mark.parametrize("name", ["llama_gqa", pytest.param("t5", marks=pytest.mark.slow)])
def test_what_stop_strings_need_reaches_no_program(name: str) -> None:
    model, inputs = pruned(name).model, Case(1, 1).inputs(name)
    prepared = model.prepare_inputs_for_generation(
        inputs["input_ids"], tokenizer=object(), assistant_tokenizer=object()
    )
    assert not {"tokenizer", "assistant_tokenizer"} & prepared.keys()


@pytest.mark.parametrize(
    "name", ["llama_gqa", "gpt2", *[pytest.param(name, marks=pytest.mark.slow) for name in NAMES[2:]]]
)
def test_cache_is_narrower_by_what_the_report_says(name: str) -> None:
    result = pruned(name)
    assert result.report.cache is not None
    sizes = []
    for model in (dense(name), result.model):
        inputs = Case(1, 1).inputs(name)
        if name == "t5":
            inputs["decoder_input_ids"] = inputs["input_ids"]
        cache = model(**inputs, use_cache=True)[CACHE]
        parts = [cache.self_attention_cache, cache.cross_attention_cache] if name == "t5" else [cache]
        sizes.append(
            sum(
                tensor[0, :, 0].nbytes
                for part in parts
                for layer in part.layers
                for tensor in (layer.keys, layer.values)
            )
        )
    assert result.report.cache == tuple(sizes)
    assert sizes[1] < sizes[0]
    assert f"{sizes[0]:,} -> {sizes[1]:,} bytes per token" in str(result.report)


@pytest.mark.parametrize(
    "name", ["llama_gqa", *[pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "t5")]]
)
def test_whole_heads_go_from_weights_and_cache(name: str) -> None:
    """Rotary angles come from an input here, so that they are channels too, which all heads share."""
    made = hf.prune(dense(name), granularity=("head",), sparsity=0.1, score="random", restore=None)
    assert {group.granularity for group in made.plan.groups} == {"head"}
    assert made.report.cache is not None
    assert made.report.cache[1] < made.report.cache[0]
    model = dense(name)
    with masked(model, removed_columns(made.plan, model)):
        wanted = Case(4, 1).run(model, name)
    assert torch.equal(Case(4, 1).run(made.model, name), wanted)
    assert not torch.equal(wanted, Case(4, 1).run(model, name)), "pruning changes nothing that can be seen"
    if name == "llama_gqa":
        cache = made.model(**Case(1, 1).inputs(name), use_cache=True)[CACHE]
        width = model.config.hidden_size // model.config.num_attention_heads
        assert {
            tuple(tensor.shape[1::2]) for layer in cache.layers for tensor in (layer.keys, layer.values)
        } == {(1, width)}
