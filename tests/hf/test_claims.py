"""A format claims of a model what was seen of it: at every position, in float32, and of every field of its
configuration; and what it cannot say is refused before the work.
"""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as hf
from models import randomise
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, nn

import fasp_fx
from fasp_fx.hf import convert, prune
from fasp_fx.hf._fields import check_equal, refuse_unsaid
from fasp_fx.hf._formats import build, config_for, example_of
from fasp_fx.hf._gguf import describe_gguf

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
RANDOM: dict[str, Any] = {"score": "random", "restore": None, "sparsity": 0.2}
#: from here on positions are stretched, queries scaled, …
ORIGINAL = 32
TURNS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn that scales nothing": {
        **{"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
        **{"attention_factor": 1.0, "truncate": False},
    },
    "llama3": {
        **{"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "longrope": {
        **{"factor": 2.0, "original_max_position_embeddings": ORIGINAL},
        **{"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.5, 3.0, 3.5]},
    },
}


def turned(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind.split()[0], "rope_theta": 1e4, **TURNS[kind], **more}}


def made(name: str, values: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A small causal model of a family, loaded in a type: what is no weight stays in float32."""
    model = randomise(hf.AutoModelForCausalLM.from_config(hf.CONFIG_MAPPING[name](**{**SIZES, **values})))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


#: of families that have a Llama's weights, the values that a field may have, the first a Llama's
FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": ("silu", "gelu"), "attention_dropout": (0.0, 0.1), "is_llama_config": (True,)},
    "mistral": {"sliding_window": (None, 16, 48)},
    "ministral3": {"sliding_window": (None,), "llama_4_scaling_beta": (0.1, 0.5)},
    "smollm3": {"no_rope_layers": ([1, 1], [1, 0]), "layer_types": (None,), "use_sliding_window": (False,)},
    "granite": {"logits_scaling": (1.0, 1.03), "residual_multiplier": (1.0, 0.9)},
    "gemma": {"hidden_act": ("silu", "gelu")},
    "helium": {"rms_norm_eps": (1e-6, 1e-3)},
    "ernie4_5": {"use_bias": (False,)},
    "cwm": {"layer_types": (["full_attention"] * 2, ["full_attention", "sliding_attention"])},
}


def drawn(seed: int) -> Any:
    draw = random.Random(seed)
    name = draw.choice([*FIELDS, "llama", "mistral", "smollm3"])
    values = {field: draw.choice([own[0], *own]) for field, own in FIELDS[name].items()}
    beta = {key: values.pop(key) for key in ("llama_4_scaling_beta",) if key in values}
    kinds = ["default", "yarn", "llama3"] if name in ("ministral3", "cwm", "helium") else [*TURNS]
    more = {**turned(draw.choice(kinds), **beta), "tie_word_embeddings": draw.random() < 0.5}
    return made(name, {**values, **more}, draw.choice([torch.float32, torch.bfloat16]))


def anew(model: Any) -> nn.Module:
    """The model in float64, made of its configuration and its weights."""
    found = type(model)(copy.deepcopy(model.config)).double()
    found.load_state_dict({name: own.double() for name, own in model.state_dict().items()})
    return found.eval()


def admitted(name: str, model: Any) -> Any:
    """What a format makes of a model before the work."""
    _, settings = config_for(name, model, fasp_fx.PruningConfig(sparsity=0.2))
    found, _ = build(name, settings.experiments, model.state_dict(keep_vars=True), model)
    check_equal(found, model, example_of(model))
    if name == "gguf":
        describe_gguf(Path(), found, "", None)
    return found


def test_what_is_admitted_computes_the_same_at_every_position() -> None:
    said = {"decilm": 0, "gguf": 0}
    for seed in range(14):
        model = drawn(seed)
        ids = torch.randint(3, 96, (2, 2 * SIZES["max_position_embeddings"]))
        for name in said:
            try:
                found = admitted(name, model)
            except fasp_fx.FaspError:
                continue
            said[name] += 1
            for length in (8, ORIGINAL + 1, ids.shape[1]):
                with torch.no_grad():
                    own, other = (anew(one)(input_ids=ids[:, :length]).logits for one in (found, model))
                assert ((own - other).norm(dim=-1) <= 1e-9 * other.norm(dim=-1)).all(), (seed, model.config)
    assert 1 < said["gguf"] < said["decilm"] < 10


BETA = turned("yarn that scales nothing", llama_4_scaling_beta=0.1)
UNSAID: list[tuple[str, dict[str, Any], str]] = [
    ("ministral3", {**BETA, "sliding_window": None}, r"rope_parameters\.llama_4_scaling_beta=0\.1"),
    ("mistral", {"sliding_window": 16}, r"MistralConfig says with sliding_window=16"),
    ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\]"),
    ("granite", {"logits_scaling": 1.03}, r"attention_multiplier=1\.0, logits_scaling=1\.03"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope_type='proport"),
    ("cohere", {}, r"logit_scale=0\.0625"),
]


@pytest.mark.parametrize("name", ["decilm", "gguf"])
@pytest.mark.parametrize(("family", "values", "why"), UNSAID)
def test_what_the_configuration_says_and_a_format_cannot_is_named(
    family: str, values: dict[str, Any], why: str, name: str
) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=rf"'{name}' has no place for what .*{why}"):
        prune(made(family, values), format=name, on_analysis=pytest.fail, **RANDOM)


def test_fields_that_the_class_does_not_read_are_of_other_programs() -> None:
    more = {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 4, "sliding_window": 4}
    model = made("llama", more)
    refuse_unsaid("gguf", type(model), model.config)


class Scaled(hf.LlamaForCausalLM):
    def forward(self, *args: Any, **options: Any) -> Any:
        found = super().forward(*args, **options)
        found.logits = found.logits * 1.03
        return found


def scaled(model: Any) -> Any:
    model.__class__ = Scaled
    return model


def unturned(model: Any) -> Any:
    """A model one layer of which has no positions, by code and not by its configuration."""

    def still(module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        cos, sin = options["position_embeddings"]
        return args, {**options, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}

    model.model.layers[1].self_attn.register_forward_pre_hook(still, with_kwargs=True)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "name"),
    [(scaled, "gguf"), (unturned, "decilm"), (unturned, "per-layer"), (unturned, "plain")],
)
def test_a_little_off_is_another_model_in_sixteen_bits_too(
    change: Callable[[Any], Any], name: str, dtype: torch.dtype
) -> None:
    model = made("llama", {"num_hidden_layers": 4}, dtype)
    for parameter in model.parameters():
        parameter.data *= 0.25 if parameter.dim() > 1 else 1
    with pytest.raises(fasp_fx.VerificationError, match="its outputs differ by"):
        prune(change(model), format=name, on_analysis=pytest.fail, **RANDOM)


def test_layers_of_a_class_of_ones_own_are_not_built_one_by_one() -> None:
    with pytest.raises(fasp_fx.ArgumentError, match="which those of Scaled are not"):
        prune(scaled(made("llama", {})), format="per-layer", on_analysis=pytest.fail, **RANDOM)


def noisy() -> Any:
    """A mixture that is further from itself in float32 than sixteen bits may be from another model."""
    return made("mixtral", {"num_local_experts": 8, "num_hidden_layers": 4}, torch.bfloat16)


def test_a_mixture_whose_router_is_in_doubt_is_pruned() -> None:
    model = noisy()
    found = prune(model, format="per-layer", **RANDOM)
    ids = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = zeroed(copy.deepcopy(model).float(), found.plan)(input_ids=ids).logits
        assert error(copy.deepcopy(found.model).float()(input_ids=ids).logits, expected) < TOLERANCE
        wide = copy.deepcopy(model).float()(input_ids=ids).logits
        assert (model(input_ids=ids).logits - wide).norm() > 5.5e-2 * wide.norm()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["plain", "per-layer", "gguf"])
def test_frequencies_that_a_cast_has_rounded_are_as_the_configuration_says(name: str) -> None:
    model = made("llama", {}).to(torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    found = prune(model, format=name, **RANDOM)
    assert found.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert any("rounded 'model.rotary_emb.inv_freq'" in note for note in found.report.notes)
    own = prune(model, granularity=("channel", "head"), **RANDOM)
    assert convert(own, "per-layer").model.dtype == torch.bfloat16


def test_heads_go_as_far_as_rows_are_whole_blocks(tmp_path: Path) -> None:
    """Rows of the output projection have as many numbers as all heads together."""
    sizes = {"head_dim": 100, "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_size": 64}
    found = prune(made("llama", sizes), format="gguf-q8_0", **{**RANDOM, "sparsity": 0.4})
    heads = [layer.num_attention_heads for layer in found.model.config.per_layer_config]
    assert heads == [8, 8]
    file = gguf.GGUFReader(found.save_pretrained(tmp_path / "small") / "model.gguf")
    assert file.fields["deci.attention.head_count"].contents() == heads


def first_and_last(budget: Any, round_to: int | None) -> list[int]:
    return [group.width * (group.needed == 0 and "self_attn" in group.name) for group in budget.groups]


def test_heads_of_zeros_fill_whole_blocks(tmp_path: Path) -> None:
    sizes = {"head_dim": 100, "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64}
    how: dict[str, Any] = {"include": ("depth",), "allocation": first_and_last}
    found = prune(made("llama", sizes), format="gguf-q8_0", **{**RANDOM, **how})
    file = gguf.GGUFReader(found.save_pretrained(tmp_path / "small") / "model.gguf")
    assert file.fields["deci.attention.head_count"].contents() == [8, 0]


@pytest.mark.parametrize(
    ("name", "value"), [("gguf-f16", 7e4), ("gguf-q8_0", 1e7), ("gguf-q4_0", 1e6), ("gguf-bf16", None)]
)
def test_a_number_beyond_the_type_of_the_file_is_named_before_the_work(name: str, value: float) -> None:
    model = made("llama", {"head_dim": 32, "hidden_size": 64})
    model.model.layers[1].mlp.up_proj.weight.detach()[3, 5] = value or 1e7
    if value is None:
        assert prune(model, format=name, **RANDOM).format == name
        return
    with pytest.raises(fasp_fx.ArgumentError, match=r"'blk\.1\.ffn_up.*; choose 'gguf-bf16' or 'gguf'"):
        prune(model, format=name, on_analysis=pytest.fail, **RANDOM)


TWO: dict[str, Any] = {"vocab_size": 96, "d_model": 32, "decoder_start_token_id": 0}
SEVERAL: dict[str, Any] = {
    "T5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**TWO, d_kv=8, d_ff=64, num_layers=4, num_heads=4)
    ),
    "BART": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            **TWO,
            **{
                f"{part}_{own}": 2 for part in ("encoder", "decoder") for own in ("layers", "attention_heads")
            },
            **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64},
        )
    ),
}


@pytest.mark.parametrize("family", SEVERAL)
def test_layers_of_two_stacks_have_no_number_of_their_own(family: str) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=r"are not .*decoder.* and .*enc"):
        prune(randomise(SEVERAL[family]()), format="per-layer", on_analysis=pytest.fail, **RANDOM)


def rows(model: Any, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return ids, model(input_ids=ids).logits


@pytest.mark.parametrize("name", ["plain", "per-layer"])
def test_a_window_is_compared_behind_its_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that forgot the window would be seen on a row that is longer than the example."""
    lost = build

    def forgets(*given: Any) -> Any:
        found, note = lost(*given)
        found.config.sliding_window = None
        return found, note

    model = made("mistral", {"sliding_window": 16})
    assert prune(model, format=name, **RANDOM).model.config.sliding_window == 16
    monkeypatch.setattr("fasp_fx.hf._formats.build", forgets)
    with pytest.raises(fasp_fx.VerificationError, match="its outputs differ"):
        prune(model, format=name, **RANDOM)
