"""Layers of their own sizes in files that others read: transformers without fasp_fx, and stock llama.cpp."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as hf
from hypothesis import given, strategies as st
from llama_cpp import missing, predictions
from models import randomise
from oracle import TOLERANCE, error, zeroed
from plain_models import dense
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import fasp_fx
from fasp_fx.allocation import Bytes, CacheBytes
from fasp_fx.hf import FORMATS, convert, prune
from fasp_fx.hf._formats import build, sizes_of
from fasp_fx.hf.modeling_per_layer import PerLayerLlamaForCausalLM
from fasp_fx.pruning import FormatName

SIZES: dict[str, Any] = {
    **{"hidden_size": 192, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6},
    **{"num_key_value_heads": 3, "head_dim": 32, "vocab_size": 400, "max_position_embeddings": 2048},
}
TURNS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "llama3": {
        **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 256},
    },
}
TEXT = (
    "The 42nd horse, it's said, wouldn't swim; 3,141 others did.\n\n  Über den Fluß — 河を渡る! <|end|> then"
)


def llama_with(**values: Any) -> hf.LlamaForCausalLM:
    return randomise(hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, **values})))


def llama(turns: str = "default") -> Any:
    return llama_with(rope_parameters=dict(TURNS[turns]), tie_word_embeddings=True)


def unequal(budget: Any, round_to: int | None) -> list[int]:
    """Another number of channels, or of heads, for each group."""
    return [
        (number // 2 % 2) if group.granularity == "head" else 32 * (1 + number % 3)
        for number, group in enumerate(budget.groups)
    ]


def blocks(budget: Any, round_to: int | None) -> list[int]:
    """The attention of the first layer, where it may go, and of the last; the feed-forward layer between."""
    absent = ("0.self_attn", "1.mlp", "2.self_attn")
    return [group.width if any(part in group.name for part in absent) else 0 for group in budget.groups]


UNIGRAM = Tokenizer(models.Unigram([("a", 0.0)]))
RANDOM: dict[str, Any] = {"score": "random", "restore": None, "sparsity": 0.2}


@cache
def pruned_to(name: str, turns: str = "default", *, absent: bool = False) -> fasp_fx.hf.Pruned:
    """A small Llama in a format, with layers of other sizes or without some blocks; tests must not change
    it.
    """
    how: dict[str, Any] = {"allocation": blocks, "include": ("depth",)} if absent else {"allocation": unequal}
    return prune(llama(turns), format=name, **how, **RANDOM)


def drawn(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, SIZES["vocab_size"], (1, count), generator=torch.Generator().manual_seed(seed))


STRANGER = """
import sys
sys.modules["fasp_fx"] = None
import torch
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
ids = torch.load(folder + "/ids.pt")
with torch.no_grad():
    logits = model.eval()(input_ids=ids).logits
written = model.generate(ids, max_new_tokens=6, do_sample=False)
assert torch.equal(written, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))
torch.save({"logits": logits, "written": written}, folder + "/out.pt")
"""


@pytest.mark.parametrize(
    ("name", "absent"), [("per-layer", False), pytest.param("decilm", True, marks=pytest.mark.slow)]
)
def test_transformers_load_what_is_written_and_generate(
    name: str, absent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, made = drawn(24), pruned_to(name, absent=absent)
    assert len({layer.intermediate_size for layer in made.model.config.per_layer_config}) > 1
    folder = made.save_pretrained(tmp_path / "small")
    torch.save(ids, folder / "ids.pt")
    subprocess.run([sys.executable, "-I", "-c", STRANGER, str(folder)], check=True, cwd=tmp_path)
    found = torch.load(folder / "out.pt")
    assert error(found["logits"], zeroed(llama(), made.plan)(input_ids=ids).logits) < TOLERANCE
    folder = made.save_pretrained(tmp_path / "again")
    monkeypatch.setattr(type(made.model), "_auto_class", None)  # as in a process that has pruned nothing
    again = fasp_fx.load(folder)
    assert (again.save_pretrained(tmp_path / "once more") / "modeling_per_layer.py").is_file()
    assert again.format == name
    assert torch.equal(found["written"], again.model.generate(ids, max_new_tokens=6, do_sample=False))


def test_sizes_and_positions_are_said_as_older_readers_look_for_them(tmp_path: Path) -> None:
    """SGLang, TensorRT-LLM and mlx-lm know a factor alone, and of ``rope_parameters`` nothing."""
    turns = dict(TURNS["llama3"])
    made = prune(
        llama_with(intermediate_size=512, rope_parameters=dict(turns)),
        format="decilm",
        round_to=256,
        **RANDOM,
    )
    folder = made.save_pretrained(tmp_path / "small")
    said = json.loads((folder / "config.json").read_text())
    assert {"rope_theta": said["rope_theta"], **said["rope_scaling"]} == turns
    factors = [own["ffn"]["ffn_mult"] for own in said["block_configs"]]
    widths = [math.ceil(int(2 * factor * SIZES["hidden_size"] / 3) / 256) * 256 for factor in factors]
    assert widths == [layer.mlp.up_proj.out_features for layer in made.model.model.layers]
    assert min(widths) == 256
    again = fasp_fx.load(folder).model(input_ids=drawn(16)).logits
    assert torch.equal(again, made.model(input_ids=drawn(16)).logits)


def trained() -> Any:
    """A small tokenizer of the kind of GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>")


@pytest.fixture(scope="module")
def llama_cpp() -> None:
    if missing():
        pytest.skip(f"no llama.cpp: {missing()}")


def _pairs(likeliest: list[Any]) -> tuple[tuple[Tensor], Tensor]:
    numbers, probabilities = zip(*likeliest, strict=True)
    return (torch.tensor(numbers),), torch.tensor(probabilities)


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.sampled(3)
@pytest.mark.parametrize(("turns", "absent"), [*((turns, False) for turns in TURNS), ("default", True)])
def test_llama_cpp_predicts_what_the_model_does(turns: str, absent: bool, tmp_path: Path) -> None:
    made = replace(pruned_to("gguf", turns, absent=absent), tokenizer=trained())
    assert len({layer.num_key_value_heads for layer in made.model.config.per_layer_config}) > 1
    file = made.save_pretrained(tmp_path / "small") / "model.gguf"
    ids = drawn(1000)
    found, written = predictions(
        file, [ids[0].tolist(), {"write": ids[0, :20].tolist(), "count": 12}], tmp_path
    )
    with torch.no_grad():
        expected = made.model(ids).logits[0].softmax(-1)
    assert [*ids[0, :20].tolist(), *written] == made.model.generate(
        ids[:, :20], max_new_tokens=12, eos_token_id=None, do_sample=False
    )[0].tolist()
    worst = max(
        abs(p - float(expected[at, token])) for at, own in enumerate(found) for token, p in own["likeliest"]
    )
    assert worst < 1e-3


def test_a_file_holds_every_size_and_type(tmp_path: Path) -> None:
    made = replace(pruned_to("gguf"), format="gguf-q8_0")
    file = made.save_pretrained(tmp_path / "small") / "model.gguf"
    found = gguf.GGUFReader(file)
    layers = made.model.config.per_layer_config
    for key, name in (
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
    ):
        assert found.fields[f"deci.{key}"].contents() == [getattr(layer, name) for layer in layers]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in found.tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["output_norm.weight"]) == ("Q8_0", "F32")
    assert "output.weight" not in kinds  # it is tied
    down = next(tensor for tensor in found.tensors if tensor.name == "blk.1.ffn_down.weight")
    expected = made.model.model.layers[1].mlp.down_proj.weight.detach()
    held = torch.tensor(gguf.dequantize(down.data, down.tensor_type))
    assert (held - expected).abs().max() <= expected.abs().max() / 127


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["gguf", "gguf-q8_0", "gguf-q4_0", "gguf-f16"])
def test_a_budget_of_bytes_counts_what_the_file_holds(name: FormatName, tmp_path: Path) -> None:
    made = prune(
        llama(), format=name, budget=(Bytes(0.8), CacheBytes(0.7)), score="random", restore=None, round_to=1
    )
    (spent, cache), file = made.report.budgets, made.save_pretrained(tmp_path / "small") / "model.gguf"
    held = sum(int(own.n_bytes) for own in gguf.GGUFReader(file).tensors)
    assert (spent.used, made.report.bytes, made.report.cache) == (
        held,
        (spent.dense, held),
        (2304, cache.used),
    )
    # A step takes as many neurons of each of three matrices of each layer.
    assert (
        0
        <= (spent.allowed - held) / spent.dense
        < 9 * 192 * FORMATS[name].multiple / llama().num_parameters()
    )


@given(st.lists(st.tuples(st.integers(0, 192), st.integers(0, 3), st.integers(1, 2)), min_size=3, max_size=3))
def test_sizes_are_read_off_the_shapes(sizes: list[tuple[int, int, int]]) -> None:
    """Whatever the layers are built with is what is found again."""
    layers = {
        number: {"intermediate_size": width, "num_key_value_heads": kv, "num_attention_heads": kv * each}
        for number, (width, kv, each) in enumerate(sizes)
    }
    config = hf.LlamaConfig(**SIZES, per_layer_config=layers, allow_global_per_layer_attribute_access=True)
    with torch.device("meta"):
        model = PerLayerLlamaForCausalLM(config)
    base = {**layers[0], **{name: SIZES[name] for name in layers[0]}}
    experiments = FORMATS["gguf"].experiments(hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES))
    for own, said in zip(
        layers.values(), sizes_of(FORMATS["gguf"], experiments, model.state_dict()).values(), strict=True
    ):
        assert {**base, **{str(path[0]): value for path, value in said.items()}} == own


def test_no_layer_has_experts_narrower_than_the_configuration_says_for_all() -> None:
    """vLLM makes them as wide as that; what their weights did not fill would hold anything."""
    model = hf.MixtralForCausalLM(
        hf.MixtralConfig(**{**SIZES, "num_local_experts": 2, "num_hidden_layers": 2})
    )
    weights = dict(randomise(model).state_dict())
    experts = "model.layers.0.mlp.experts."
    weights[f"{experts}down_proj"] = weights[f"{experts}down_proj"][:, :, :40].clone()
    gates, values = weights[f"{experts}gate_up_proj"].chunk(2, dim=1)
    weights[f"{experts}gate_up_proj"] = torch.cat([gates[:, :40], values[:, :40]], 1)
    experiments = FORMATS["per-layer"].experiments(hf.MixtralForCausalLM, model.config)
    config = build("per-layer", experiments, weights, model)[0].config
    assert config.intermediate_size == 40
    assert [layer.intermediate_size for layer in config.per_layer_config] == [40, SIZES["intermediate_size"]]


REFUSED = {
    ("qwen2", "gguf"): r"has no place for 'model.layers.0.self_attn.q_proj.bias'",
    ("qwen3", "decilm"): r"has no place for 'model.layers.0.self_attn.q_norm.weight'",
    ("mistral", "gguf"): "no place for what MistralConfig says with sliding_window=4096",
    ("phi3", "gguf"): r"has no place for 'model.layers.0.self_attn.qkv_proj.weight'",
    ("gpt2", "decilm"): r"has no place for 'transformer.wte.weight'",
    ("mixtral", "gguf"): r"has no place for 'model.layers.0.mlp",
}


@pytest.mark.parametrize(("model", "name"), REFUSED)
def test_what_a_format_has_no_place_for_is_said_before_anything_runs(model: str, name: str) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=REFUSED[model, name]):
        prune(dense(model), format=name, sparsity=0.2, calibration=iter(()))


def test_a_pruned_program_is_converted_where_the_format_can_say_it() -> None:
    own = prune(llama(), granularity=("channel", "head"), **RANDOM)
    expected = own.model(input_ids=drawn(16)).logits
    assert error(convert(own, "per-layer").model(input_ids=drawn(16)).logits, expected) < TOLERANCE
    with pytest.raises(fasp_fx.ArgumentError, match=r"cannot say that dimension 0 of .*q_proj.weight"):
        convert(own, "decilm")


def heads(made: fasp_fx.hf.Pruned) -> list[int]:
    return [layer.num_key_value_heads for layer in made.model.config.per_layer_config]


def test_blocks_are_absent_from_the_file_too(tmp_path: Path) -> None:
    folder = pruned_to("decilm", absent=True).save_pretrained(tmp_path / "small")
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = {name.split(".")[3] for name in [*file.keys()] if name.startswith("model.layers.1.")}
    assert names == {"self_attn", "input_layernorm"}


@pytest.mark.parametrize("name", ["decilm", "gguf", "per-layer"])
def test_a_model_without_blocks_is_converted(name: str) -> None:
    made = pruned_to("per-layer", absent=True)
    assert heads(made) == [0, 3, 0]
    again = convert(made, name)
    assert error(again.model(input_ids=drawn(16)).logits, made.model(input_ids=drawn(16)).logits) == 0


def test_attention_goes_whole_or_not_where_a_format_cannot_say_less() -> None:
    """And that of the first layer stays, which vLLM cannot do without."""
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers[:2]:
            layer.self_attn.o_proj.weight.mul_(1e-4)
    calibration = [{"input_ids": drawn(64)}]
    made = prune(
        model, format="decilm", include=("depth",), calibration=calibration, sparsity=0.2, allocation="global"
    )
    assert heads(made) == [3, 0, 3]
    reasons = {line.name: line.reason for line in made.report.lines}
    assert reasons["model.layers.0.self_attn.o_proj.weight"].startswith("left whole: no layer of LlamaConfig")


def test_blocks_cannot_go_where_all_layers_are_equal() -> None:
    with pytest.raises(fasp_fx.ArgumentError, match="include='depth' cannot be had in the format 'plain'"):
        prune(llama(), format="plain", include=("depth",), **RANDOM)


FOREIGN = hf.PreTrainedTokenizerFast(tokenizer_object=UNIGRAM)
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
CANNOT: list[tuple[dict[str, Any], Any, str]] = [
    ({}, FOREIGN, 'has model "Unigram"'),
    ({"intermediate_size": 190}, None, "has rows of 190 numbers, and Q8_0 holds blocks of 32"),
    (DYNAMIC, None, "no positions of the kind 'dynamic'"),
]


@pytest.mark.parametrize(("values", "tokenizer", "why"), CANNOT)
def test_what_a_file_cannot_hold_is_said_before_the_work(
    values: dict[str, Any], tokenizer: Any, why: str
) -> None:
    with pytest.raises(fasp_fx.ArgumentError, match=why):
        prune(llama_with(**values), tokenizer, format="gguf-q8_0", on_analysis=pytest.fail, **RANDOM)


@pytest.mark.parametrize(("values", "tokenizer", "why"), CANNOT)
def test_nothing_is_left_of_a_file_that_cannot_be_written(
    values: dict[str, Any], tokenizer: Any, why: str, tmp_path: Path
) -> None:
    parts = {"model": llama_with(**values), "tokenizer": tokenizer, "format": "gguf-q8_0"}
    made = replace(pruned_to("gguf"), **parts)
    with pytest.raises(fasp_fx.ArgumentError, match=why):
        made.save_pretrained(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_has_the_names_of_the_formats() -> None:
    assert set(FormatName.__args__) == {*FORMATS}
    assert all(math.gcd(form.multiple, 32) == form.multiple for form in FORMATS.values())
