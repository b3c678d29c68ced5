"""The transformers zoo: small random models of every kind, as tables of ``model class: what differs from the
small defaults``.

A second row of a class has a key of its own and says ``model``. The small defaults are one table of values,
for whatever fields a configuration has.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers.integrations import moe
from x.benchmarks.zoos import VOCABULARY, Draw, Entry, constant
from x.benchmarks.zoos._transformers_multi import MULTIMODAL
from x.benchmarks.zoos._transformers_sight import AUDIO, VISION
from x.benchmarks.zoos._transformers_text import DECODERS, ENCODER_DECODERS, ENCODERS, MIXTURES, STATE_SPACES

TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "decoder": DECODERS,
    "moe": MIXTURES,
    "state space": STATE_SPACES,
    "encoder": ENCODERS,
    "encoder-decoder": ENCODER_DECODERS,
    "vision": VISION,
    "audio": AUDIO,
    "multimodal": MULTIMODAL,
}


def entries() -> list[Entry]:
    """Every model of the zoo, named by its model type."""
    found = [_entry(kind, name, dict(row)) for kind, table in TABLES.items() for name, row in table.items()]
    names = [entry.name for entry in found]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
    return found


def _entry(kind: str, name: str, row: dict[str, Any]) -> Entry:
    """A row's ``model``, ``inputs``, ``name``, ``config``, ``double`` and ``batches`` belong to the entry,
    the rest to the configuration.
    """
    model = getattr(transformers, row.pop("model", name))
    inputs: dict[str, Draw] = dict(row.pop("inputs"))
    double = row.pop("double", kind == "moe")
    batches = row.pop("batches", (2, 3))
    config = getattr(transformers, row.pop("config")) if "config" in row else model.config_class
    title = row.pop("name", config.model_type)
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters:
        inputs.setdefault("use_cache", constant(False))

    def make() -> nn.Module:
        if double:
            # what a capture takes in any dtype, since the grouped product itself has no float64 kernel
            moe._can_use_grouped_mm = lambda *arguments: False
        made = model(shrink(config, row))
        return made.to(torch.float64) if double else made

    return Entry(title, kind, make, keywords=inputs, double=double, batches=batches)


_WIDTH, _INNER, _LAYERS, _HEADS, _KV_HEADS, _IMAGE, _PATCH, _EXPERTS = 64, 128, 2, 4, 2, 32, 8, 4

_FIELDS: list[tuple[int, str]] = [
    (VOCABULARY, "vocab_size text_vocab_size"),
    (
        _WIDTH,
        (
            "hidden_size d_model n_embd embedding_size embed_dim dim hidden_dim emb_dim word_embed_proj_dim"
            " projection_dim decoder_hidden_size out_hidden_size"
        ),
    ),
    (
        _INNER,
        (
            "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff d_inner ffn_embed_dim dim_ff"
            " decoder_intermediate_size n_inner"
        ),
    ),
    (
        _LAYERS,
        (
            "num_hidden_layers num_layers encoder_layers decoder_layers n_layer n_layers depth"
            " num_decoder_layers num_encoder_layers decoder_num_hidden_layers"
        ),
    ),
    (
        _HEADS,
        (
            "num_attention_heads encoder_attention_heads decoder_attention_heads n_head n_heads num_heads"
            " attention_heads decoder_num_attention_heads"
        ),
    ),
    (
        _KV_HEADS,
        "num_key_value_heads decoder_num_key_value_heads encoder_num_key_value_heads multi_query_group_num",
    ),
    (16, "head_dim d_kv linear_key_head_dim linear_value_head_dim v_head_dim qk_nope_head_dim kv_lora_rank"),
    (8, "qk_rope_head_dim"),
    (24, "q_lora_rank"),
    (_IMAGE, "image_size moe_intermediate_size shared_expert_intermediate_size"),
    (_PATCH, "patch_size"),
    (_EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_topk moe_k eos_token_id decoder_start_token_id sep_token_id"),
    (1, "bos_token_id cls_token_id n_shared_experts first_k_dense_replace n_group topk_group"),
    (0, "pad_token_id"),
]
SMALL: dict[str, Any] = {name: value for value, names in _FIELDS for name in names.split()}
SMALL |= {
    "mask_token_id": 3,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_source_positions": 64,
    "max_target_positions": 64,
}


def shrink(kind: Any, overrides: dict[str, Any]) -> Any:
    """A small configuration of a class; ``overrides`` win, and a dict given for a sub-configuration is
    applied to that.
    """
    # a field that holds one value per stage is left to the overrides
    own = {field.name for field in dataclasses.fields(kind) if not isinstance(field.default, (list, tuple))}
    mapped = kind.attribute_map
    values = {mapped.get(name, name): value for name, value in SMALL.items() if mapped.get(name, name) in own}
    values = {name: value for name, value in values.items() if name not in mapped or mapped[name] not in own}
    for name, sub in kind.sub_configs.items():
        given = dict(overrides.get(name, {}))
        model_type = given.pop("model_type", None)
        chosen = sub if model_type is None else type(transformers.AutoConfig.for_model(model_type))
        if chosen is not transformers.AutoConfig:  # any model would do: left to the overrides
            values[name] = shrink(chosen, given)
    return kind(**values | {name: value for name, value in overrides.items() if name not in kind.sub_configs})
