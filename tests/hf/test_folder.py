"""Pruned models on disk, and what transformers makes of them."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import Case, pruned
from models import make_model
from safetensors.torch import load_file
from saved import GOLDEN
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import fasp_fx
from fasp_fx import hf
from fasp_fx.base import CACHE
from fasp_fx.hf._folder import FILES

CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{% if"
    " add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> hf.Pruned:
    """A pruned Llama with a byte-level tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("bytes")
    make_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    return dataclasses.replace(pruned("llama_gqa"), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def folder(bytes_model: hf.Pruned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bytes_model.save_pretrained(tmp_path_factory.mktemp("saved") / "out")


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(40, 60)[None]).logits
    return found


def test_loaded_model_is_the_saved_one(bytes_model: hf.Pruned, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is hf.PrunedForCausalLM
    assert torch.equal(_logits(loaded), _logits(bytes_model.model))
    assert (loaded.plan, loaded.report) == (bytes_model.plan, bytes_model.report)
    assert loaded.state_dict().keys() == bytes_model.model.state_dict().keys()
    assert not loaded.training
    assert loaded.generation_config.to_diff_dict() == bytes_model.model.generation_config.to_diff_dict()
    ids = torch.arange(40, 50)[None]
    assert torch.equal(
        loaded.generate(ids, max_new_tokens=8, do_sample=False),
        bytes_model.model.generate(ids, max_new_tokens=8, do_sample=False),
    )


def test_folder_is_one_of_transformers(folder: Path) -> None:
    names = {file.name for file in folder.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "plan.json",
    } <= names
    assert isinstance(AutoConfig.from_pretrained(folder), hf.PrunedConfig)


def test_weights_are_stored_once(tmp_path: Path) -> None:
    result = pruned("gpt2")
    result.save_pretrained(tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names  # tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(Case(1, 1).run(loaded, "gpt2"), Case(1, 1).run(result.model, "gpt2"))


@pytest.mark.slow
def test_in_a_new_process() -> None:
    folder = str(GOLDEN / "hf")
    code = (
        "import fasp_fx, sys; assert 'transformers' not in sys.modules\n"
        "import fasp_fx.hf; from transformers import AutoModelForCausalLM\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({folder!r})).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "PrunedForCausalLM"


def test_pipeline_and_chat_template(bytes_model: hf.Pruned, folder: Path) -> None:
    made = pipeline("text-generation", model=str(folder))
    chat = [{"role": "user", "content": "hello"}]
    answer = made(chat, max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert answer[-1]["role"] == "assistant"
    ids = bytes_model.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    found = bytes_model.model.generate(ids, max_new_tokens=6, do_sample=False)
    assert answer[-1]["content"] == bytes_model.tokenizer.decode(
        found[0, ids.shape[1] :], skip_special_tokens=True
    )
    both = made(["a", "a longer text"], batch_size=1, max_new_tokens=3, do_sample=False)
    assert len(both) == 2


def test_lm_eval_scores_it(bytes_model: hf.Pruned) -> None:
    """As docs/evaluation.md says; held against the log-likelihood computed by hand."""
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = bytes_model.model, bytes_model.tokenizer
    request = instance("loglikelihood", {}, ("Ice is", " cold"), 0)
    scorer = HFLM(model, tokenizer=tokenizer, batch_size=2)
    ((found, _),) = scorer.loglikelihood([request], disable_tqdm=True)
    ids = torch.tensor(tokenizer("Ice is cold")["input_ids"])
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])
    assert found == pytest.approx(float(expected[-5:].sum()), rel=1e-4)


@pytest.mark.slow
def test_fine_tuned_model_keeps_its_weights(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = _logits(model)
    rows = [
        {"input_ids": list(range(20 + shift, 36 + shift)), "labels": list(range(20 + shift, 36 + shift))}
        for shift in range(8)
    ]
    settings = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        save_steps=1,
    )
    Trainer(model, settings, train_dataset=rows).train()
    trained = _logits(model)
    assert not torch.equal(before, trained)
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(_logits(checkpoint), trained)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), trained)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "hf", tmp_path / "copy"))


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found(copied: Path, name: str) -> None:
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[:-1])
    with pytest.raises(fasp_fx.StoreError, match=name.replace(".", r"\.")):
        hf.PrunedForCausalLM.from_pretrained(copied)
    (copied / name).unlink()
    with pytest.raises(fasp_fx.StoreError, match=name.replace(".", r"\.")):
        hf.PrunedForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": torch.float16}, "float16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "the device"),
        ({"device_map": "sequential"}, "the device"),
        ({"attn_implementation": "eager"}, "attn_implementation"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused(folder: Path, options: dict[str, Any], says: str) -> None:
    for kind in (hf.PrunedForCausalLM, AutoModelForCausalLM):
        with pytest.raises(fasp_fx.ArgumentError, match=says):
            kind.from_pretrained(folder, **options)


def test_a_changed_configuration_is_the_models(folder: Path) -> None:
    tokens = torch.arange(3, 9)[None]
    model = AutoModelForCausalLM.from_pretrained(folder, use_cache=False, pad_token_id=7, dtype="auto")
    again = AutoModelForCausalLM.from_pretrained(folder, config=model.config, device_map="cpu")
    for made in (model, again):
        assert (made.config.use_cache, made.config.pad_token_id) == (False, 7)
        assert (made.dtype, made(tokens).get(CACHE)) == (torch.float64, None)
    asked = AutoModelForCausalLM.from_pretrained(folder, output_hidden_states=True, dtype=torch.float64)
    with pytest.raises(fasp_fx.ArgumentError, match="hidden_states"):
        asked(tokens)


def test_the_wrong_auto_class_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(fasp_fx.StoreError, match="AutoModelForCausalLM"):
        AutoModelForSeq2SeqLM.from_pretrained(folder)
    with pytest.raises(fasp_fx.StoreError, match="is not a folder"):
        hf.PrunedForCausalLM.from_pretrained(tmp_path / "nowhere")
