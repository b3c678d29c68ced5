"""Distillation of models that generate: decoders, plain checkpoints, and from the command line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import dense, pruned
from hypothesis import given, strategies as st
from models import make_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import fasp_fx
from fasp_fx import hf
from fasp_fx.cli._app import app
from fasp_fx.cli._prune import training_steps

LENGTH = 32
SMALL = ["--length", str(LENGTH), "--batches", "6", "--eval-batches", "3", "--device", "cpu"]
CHEAP = ["--score", "magnitude", "--no-restore"]  # leaves something to learn


def tokens(count: int, width: int = 12, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 90, (2, width), generator=generator) for _ in range(count)]


def divergence(model: Any, teacher: Any, batch: dict[str, Tensor]) -> float:
    """The mean of KL(teacher ‖ model) over all tokens."""
    with torch.no_grad():
        found, wanted = (
            one(**batch, use_cache=False).logits.double().log_softmax(-1).flatten(0, 1)
            for one in (model, teacher)
        )
    return float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("plain", [False, True])
def test_a_decoder_learns_and_generates_and_is_saved(plain: bool, tmp_path: Path) -> None:
    teacher, data = dense("llama_gqa"), tokens(10)
    result = copy.deepcopy(pruned("llama_gqa"))
    if plain:
        result = hf.prune(teacher, sparsity=0.2, score="magnitude", restore=None, format="plain")
    other = {"input_ids": data[0]}
    before = divergence(result.model, teacher, other)
    after = fasp_fx.distil(result, teacher, data, learning_rate=1e-3, epochs=6, top_k=64)
    assert after.report.recovery is not None
    assert "divergence" in after.report.recovery.criterion
    assert divergence(after.model, teacher, other) < 0.9 * before
    assert after.model.generate(
        other["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0
    ).shape == (2, 15)
    after.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    torch.testing.assert_close(loaded(**other).logits, after.model(**other).logits)
    if not plain:
        assert loaded.report.recovery == after.report.recovery


# --- the command line


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(done: Result) -> str:
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cli")
    make_model(made / "model", layers=1)
    (made / "text.txt").write_text("Größe matters: a smaller model answers sooner. " * 12, encoding="utf-8")
    texts = ["--calibration", made / "text.txt", "--text", made / "text.txt"]
    done = invoke(
        "prune", made / "model", *texts, "--out", made / "pruned", "--round-to", "8", *CHEAP, *SMALL
    )
    assert done.exit_code == 0, done.output
    return made


def test_recover_what_was_pruned(folder: Path, tmp_path: Path) -> None:
    text = folder / "text.txt"
    command = [
        "recover",
        folder / "pruned",
        "--dense",
        folder / "model",
        "--data",
        text,
        "--text",
        text,
        "--epochs",
        "4",
        "--learning-rate",
        "1e-3",
        *SMALL,
    ]
    done = invoke(*command, "--checkpoint", tmp_path / "run", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "recovered: distillation" in " ".join(done.stdout.split())
    assert "perplexity on chunks 6 to 8 of text.txt" in done.stdout
    models = [
        AutoModelForCausalLM.from_pretrained(where).eval()
        for where in (folder / "pruned", tmp_path / "out", folder / "model")
    ]
    assert type(models[0]) is type(models[1])
    ids = {"input_ids": torch.arange(2, 34)[None]}
    assert not torch.equal(models[0](**ids).logits, models[1](**ids).logits)
    again = invoke(*command, "--checkpoint", tmp_path / "run", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(models[1](**ids).logits, resumed(**ids).logits)
    other = invoke(*command, "--seed", "1", "--checkpoint", tmp_path / "run", "--out", tmp_path / "other")
    assert "another run" in refused(other)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["again", "out", "run"]


def test_prune_and_recover_in_one_command(folder: Path, tmp_path: Path) -> None:
    done = invoke(
        "prune", folder / "model", "--recover", "2", "--round-to", "8", "--out", tmp_path / "out", *SMALL
    )
    assert done.exit_code == 0, done.output
    assert "recovered: distillation" in " ".join(done.stdout.split())
    report = AutoModelForCausalLM.from_pretrained(tmp_path / "out").report
    assert report.recovery.steps > 0
    assert report.config.round_to == 8
    assert "recovery" in invoke("inspect", tmp_path / "out").stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--learning-rate", "0"], "learning_rate"),
        (["--batches", "1"], "--batches"),
        (["--length", "4000"], "--length"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--dense", "./nowhere"], "nowhere"),
    ],
)
def test_requests_that_make_no_sense(folder: Path, tmp_path: Path, options: list[str], said: str) -> None:
    command = ["recover", folder / "pruned", "--dense", folder / "model", "--out", tmp_path / "out", *SMALL]
    assert said in refused(invoke(*command, *options))
    assert not list(tmp_path.iterdir())


@given(st.integers(2, 40), st.integers(2, 1500))
def test_chunks_are_trained_on_as_short_texts(count: int, length: int) -> None:
    chunks = torch.arange(count * length).reshape(count, length)
    steps = training_steps(chunks)
    assert torch.equal(torch.cat([step.flatten() for step in steps]), chunks.flatten()), "all, in turn"
    assert len(steps) >= 2, "one is held out"
    parts = next(parts for parts in range(1, length + 1) if length / parts <= 256)
    assert {step.shape[1] for step in steps} == {length // parts if length % parts == 0 else length}
    assert all(len(step) == 1 or step.numel() <= 1024 for step in steps)


@pytest.mark.parametrize(
    ("pruned", "dense", "out", "said"),
    [
        ("model", "model", "out", "no pruned language model"),
        ("nowhere", "model", "out", "nowhere"),
        ("pruned", "model", "model", "exists"),
        ("pruned", "other", "out", "not the model that was pruned"),
    ],
)
def test_folders_that_hold_nothing_to_recover(
    folder: Path, pruned: str, dense: str, out: str, said: str
) -> None:
    if dense == "other" and not (folder / dense).exists():
        make_model(folder / dense, layers=2)
    command = ["recover", folder / pruned, "--dense", folder / dense, "--out", folder / out]
    assert said in refused(invoke(*command, "--data", folder / "text.txt", *SMALL))
