"""What the configuration of a Llama says of a model that computes what a Llama does, and what of the model's
own configuration it leaves unsaid.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import LlamaConfig

from ..base._tolerable import tolerable
from ..base.compat import FakeTensorMode
from ..base.compat._transformers import quiet
from ..errors import ArgumentError

#: what the config of a Llama has that those of its like have under the same names
_LLAMA = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"),
)
#: what says nothing of what is predicted: how weights were drawn, what is dropped in training, what a call
#: returns, how a file was stored
_SILENT = {
    *("_name_or_path", "architectures", "auto_map", "model_type", "per_layer_config", "quantization_config"),
    *("initializer_range", "use_cache", "pretraining_tp", "transformers_version", "return_dict"),
    *("output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type"),
    *("attention_dropout", "hidden_dropout", "resid_dropout", "resid_pdrop", "embd_pdrop"),
}
#: what other fields say, at each of their places, where they change nothing
_NEUTRAL: dict[str, Any] = {
    **{"layer_types": "full_attention", "no_rope_layers": 1, "partial_rotary_factor": 1},
    **{"use_sliding_window": False, "use_bias": False},
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), 1),
}
#: what the positions of a Llama are said with
_POSITIONS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": (
        *("factor", "short_factor", "long_factor", "attention_factor"),
        "original_max_position_embeddings",
    ),
    "yarn": (
        *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        "original_max_position_embeddings",
    ),
}


def llama_of(config: Any) -> LlamaConfig:
    """The configuration of the Llama that a model may be."""
    given = config.to_dict()
    return LlamaConfig(**{own: given[own] for own in _LLAMA if own in given})


def refuse_unsaid(name: str, kind: Any, config: Any) -> None:
    """Refuse what a class reads of its configuration and a Llama's does not say.

    Args:
        name: of the format.
        kind, config: the model's.

    Raises:
        ArgumentError: names all of it.
    """
    given, llama = config.to_dict(), llama_of(config).to_dict()
    known = _SILENT.union(_LLAMA)
    rest = {own: given[own] for own in sorted(_fields_read(kind, config) & given.keys() - known)}
    turns = dict(given.get("rope_parameters") or {})
    plain = ("rope_theta", "rope_type", "type", *_POSITIONS.get(turns.get("rope_type", ""), ()))
    nested = {f"rope_parameters.{own}": turns[own] for own in turns if own not in plain}
    if turns and turns.get("rope_type") not in _POSITIONS:
        nested["rope_parameters.rope_type"] = turns.get("rope_type")
    unsaid = [
        f"{own}={value!r:.80}"
        for own, value in (rest | nested).items()
        if value is not None and value != llama.get(own) and not _changes_nothing(own, value)
    ]
    if unsaid:
        raise ArgumentError(
            f"the format {name!r} has no place for what {type(config).__name__} says with"
            f" {', '.join(unsaid)}; choose another format"
        )


def _changes_nothing(field: str, value: Any) -> bool:
    places = value if isinstance(value, (list, tuple)) else [value]
    neutral = _NEUTRAL.get(field.removeprefix("rope_parameters."))
    return all(place == neutral for place in places)


def _fields_read(kind: Any, config: Any) -> set[str]:
    """Which fields of a configuration a class reads when it is built and called; all where it cannot be
    called without weights.

    Others are of other programs, which cannot change what the model computes.
    """
    read: set[str] = set()

    class Watched(type(config)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    watched = copy.deepcopy(config)
    watched.__class__ = Watched
    try:
        with quiet(), FakeTensorMode(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            kind(watched).eval()(input_ids=torch.zeros((1, 2), dtype=torch.long), use_cache=False)
    except tolerable(Exception):
        return set(config.to_dict())
    return read
