"""What a model does with labels, masks and positions beside its tokens is what its pruned one does, or the
call is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import randomise
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import fasp_fx
from fasp_fx import hf
from fasp_fx.base import CACHE

SIZES = {
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART = SIZES | {
    "d_model": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
}
LLAMA = SIZES | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (batch, count), generator=torch.Generator().manual_seed(seed))


def nearly_whole(model: Any) -> Any:
    """The model without one neuron of each layer that does nothing, so that the outputs stay what
    they were.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("fc2.weight", "down_proj.weight")):
                parameter[:, -1] = 0
    name = "fc2" if any(name.endswith("fc2.weight") for name, _ in model.named_parameters()) else "down_proj"
    return hf.prune(
        model, score="magnitude", restore=None, allocation="uniform", sparsity={f"*{name}.weight": 0.03}
    )


def made(kind: str, config: Any) -> Any:
    return randomise(getattr(transformers, kind)(config), std=0.2).eval()


IDS, LABELS = tokens(2, 9), tokens(2, 5, 1)
LABELS[0, 4:] = -100
MASK = torch.arange(9) >= torch.tensor([[4], [0]])
OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48} | SIZES
#: the class and the configuration of a model, and what it is called with
HABITS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "labels that are moved on": (
        "BartForConditionalGeneration",
        lambda: transformers.BartConfig(**BART, encoder_ffn_dim=48, decoder_start_token_id=2),
        {"input_ids": IDS, "labels": LABELS},
    ),
    "a loss at its place, and weights that no program reads": (
        "BartForCausalLM",
        lambda: transformers.BartConfig(**BART, encoder_ffn_dim=48),
        {"input_ids": IDS, "labels": IDS, "use_cache": False},
    ),
    "positions of hidden tokens": (
        "OPTForCausalLM",
        lambda: transformers.OPTConfig(**OPT, num_hidden_layers=1, num_attention_heads=4),
        {"input_ids": IDS, "attention_mask": MASK.long(), "labels": IDS.masked_fill(~MASK, -100)},
    ),
    "a loss that is divided": (
        "LlamaForCausalLM",
        lambda: transformers.LlamaConfig(**LLAMA),
        {"input_ids": IDS, "labels": IDS, "num_items_in_batch": torch.tensor(1000), "use_cache": False},
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(next(iter(HABITS)), marks=pytest.mark.slow), *list(HABITS)[1:]]
)
def test_a_pruned_model_does_as_the_model_does(name: str, tmp_path: Path) -> None:
    kind, config, given = HABITS[name]
    model = made(kind, config())
    result = nearly_whole(model)
    with torch.no_grad():
        found, expected = (called(**given) for called in (result.model, model))
    assert torch.allclose(found.logits, expected.logits, atol=1e-4)
    assert torch.allclose(found.loss, expected.loss, atol=1e-4)
    reader = AutoModelForSeq2SeqLM if "Conditional" in kind else AutoModelForCausalLM
    loaded = reader.from_pretrained(result.save_pretrained(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(loaded(**given).loss, found.loss)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        moved = (one.prepare_decoder_input_ids_from_labels(LABELS) for one in (result.model, model))
        assert torch.equal(*moved)


def test_packed_texts_are_refused_where_the_model_keeps_them_apart() -> None:
    model = made("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA))
    pruned = nearly_whole(model).model
    ids, positions = tokens(1, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        apart, together = (
            model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
            for mask in (None, torch.ones_like(ids))
        )
        assert not torch.allclose(apart, together, atol=1e-3)
        with pytest.raises(fasp_fx.ArgumentError, match="begin again"):
            pruned(input_ids=ids, position_ids=positions)
        assert torch.allclose(
            pruned(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits,
            together,
            atol=1e-4,
        )
        assert torch.allclose(
            pruned(input_ids=ids, position_ids=3 + torch.arange(9)[None]).logits,
            model(input_ids=ids).logits,
            atol=1e-4,
        )


def test_a_loss_of_the_models_own_is_refused() -> None:
    class Own(transformers.LlamaForCausalLM):
        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            cache: Any = None,
            past_key_values: Any = None,
            labels: Tensor | None = None,
            use_cache: bool | None = None,
            logits_to_keep: int | Tensor = 0,
            **given: Any,
        ) -> Any:
            given |= {CACHE: cache if CACHE == "cache" else past_key_values}
            given |= {"position_ids": position_ids, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
            output = super().forward(input_ids, attention_mask, **given)
            output.loss = None if labels is None else output.logits.square().mean()
            return output

    pruned = hf.prune(
        randomise(Own(transformers.LlamaConfig(**LLAMA)), std=0.2).eval(),
        sparsity=0.2,
        score="magnitude",
        restore=None,
    ).model
    assert pruned(input_ids=tokens(1, 5)).loss is None
    with pytest.raises(fasp_fx.ArgumentError, match="loss of its own"):
        pruned(input_ids=tokens(1, 5), labels=tokens(1, 5))


def test_outputs_of_routers_are_refused_with_the_remedy() -> None:
    config = transformers.MixtralConfig(
        **LLAMA, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True
    )
    with pytest.raises(fasp_fx.ArgumentError, match="output_router_logits = False"):
        hf.prune(made("MixtralForCausalLM", config), sparsity=0.2, score="magnitude", restore=None)
