"""Zero-shot tasks: figures against log-likelihoods computed by hand, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import questions
import torch
from models import made
from tiny_llama import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import CausalLMOutput
from typer.testing import CliRunner, Result

import fasp_fx
from fasp_fx import evaluation
from fasp_fx.cli._app import app

pytestmark = pytest.mark.usefixtures("shared_captures")

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("evaluation")
    make_model(made / "model", layers=1)
    (made / "text.txt").write_text("Größe matters: a smaller model answers sooner. " * 12, encoding="utf-8")
    questions.write(made / "own.yaml")
    return made


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "model").eval()


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "model")


def _eval(folder: Path, *options: str | Path) -> Result:
    return CliRunner().invoke(app, ["eval", str(folder / "model"), *map(str, options), "--device", "cpu"])


def logits(m: Any, input_ids: torch.Tensor, use_cache: bool) -> CausalLMOutput:
    """Called as a pruned program is; nothing else of transformers."""
    assert not use_cache
    return CausalLMOutput(logits=m.model(input_ids=input_ids).logits)


@pytest.mark.parametrize("wrapped", [False, True])
def test_scores_are_those_computed_by_hand(folder: Path, model: Any, tokenizer: Any, wrapped: bool) -> None:
    right = questions.by_hand(lambda ids: model(input_ids=ids).logits, tokenizer)
    assert len({tuple(answers) for answers in right.values()}) == 3  # the three metrics are told apart
    given = made(logits, model=model) if wrapped else model
    given.train()
    model.model.layers[0].eval()
    modes, state = [module.training for module in given.modules()], torch.get_rng_state()
    scores = evaluation.tasks(given, tokenizer, [str(folder / "own.yaml")], batch_size=3)
    questions.check(scores, right)
    assert [module.training for module in given.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert tokenizer.pad_token is None
    with pytest.raises(fasp_fx.ArgumentError, match="use at least 1"):
        evaluation.tasks(given, tokenizer, [str(folder / "own.yaml")], limit=0)


def test_the_command_says_what_the_function_finds(folder: Path, model: Any, tokenizer: Any) -> None:
    done = _eval(folder, "--task", folder / "own.yaml", "--limit", "4", "--json")
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["models"]
    scores = [evaluation.TaskScore(**score) for score in found["tasks"]]
    questions.check(scores, questions.by_hand(lambda ids: model(input_ids=ids).logits, tokenizer), 4)
    one = _eval(folder, "--task", folder / "own.yaml", "--limit", "1")
    assert "own acc_bytes 1.0000 on 1 examples" in one.stdout or "own acc_bytes 0.0000 on" in one.stdout
    assert "±" not in one.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "nothing to measure"),
        (["--task", "nowhere.yaml"], "knows no task 'nowhere.yaml'"),
        (["--task", "farawy"], "did you mean faraway"),
        (["--task", "faraway"], "lm-eval cannot run faraway"),
        (["--task", "no.yaml"], "lm-eval cannot run no.yaml"),
        (["--text", "text.txt", "--length", "100000"], "less than one chunk"),
        (["--text", "text.txt", "--length", "200"], "128 positions"),
        (["nowhere/model/at/all", "--text", "text.txt"], "no model"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], says: str
) -> None:
    import lm_eval.tasks

    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    real = lm_eval.tasks.TaskManager
    # The index of the tasks that come with the harness takes long to read.
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_defaults: real(include_path=str(tmp_path), include_defaults=False),
    )
    faraway = questions.TASK.replace("json", "nobody/nothing").replace("own", "faraway")
    (tmp_path / "faraway.yaml").write_text(faraway.format(data="x", cache="y"), encoding="utf-8")
    (folder / "no.yaml").write_text("not a task", encoding="utf-8")
    done = _eval(folder, *options)
    assert done.exit_code == 2, done.output
    assert says in next(line for line in done.stderr.splitlines() if "error:" in line)


def test_missing_harness_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasp_fx.cli.evaluation.importlib.util.find_spec", lambda name: None)
    assert 'pip install "fasp_fx[eval]"' in _eval(folder, "--task", "a name of this test").stderr


def test_perplexity_is_that_of_evaluation_mode() -> None:
    layers = {"table": torch.nn.Embedding(16, 16), "dropout": torch.nn.Dropout(0.5)}
    model = made(
        lambda m, input_ids, use_cache: CausalLMOutput(logits=m.dropout(m.table(input_ids))), **layers
    )
    chunks = torch.randint(0, 16, (2, 9))
    expected = evaluation.perplexity(model, chunks)
    assert evaluation.perplexity(model.train(), chunks) == expected
    assert model.training
    assert model.dropout.training
