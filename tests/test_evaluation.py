"""Zero-shot tasks: figures against log-likelihoods computed by hand, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import questions
import torch
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
    questions.write(made / "own.jsonl")
    return made


def _invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_own_questions_of_a_dense_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    fractions: list[float] = []
    scores = evaluation.tasks(
        model, tokenizer, [str(folder / "own.jsonl")], batch_size=3, progress=fractions.append
    )
    right = questions.by_hand(lambda ids: model(input_ids=ids).logits, tokenizer)
    assert len({tuple(answers) for answers in right.values()}) == 3  # the three metrics are told apart
    questions.check(scores, right)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert [module.training for module in model.modules()] == modes
    assert tokenizer.pad_token is None


class Logits(torch.nn.Module):
    """Called as a pruned program is; nothing else of transformers."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> CausalLMOutput:
        assert not use_cache
        return CausalLMOutput(logits=self.model(input_ids=input_ids).logits)


def test_own_questions_of_a_module(folder: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model").eval(),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    scores = evaluation.tasks(Logits(model), tokenizer, [str(folder / "own.jsonl")])
    questions.check(scores, questions.by_hand(lambda ids: model(input_ids=ids).logits, tokenizer))


def test_limit_beyond_the_file_takes_all(folder: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    assert {
        score.examples for score in evaluation.tasks(model, tokenizer, [str(folder / "own.jsonl")], limit=99)
    } == {len(questions.QUESTIONS)}


def test_one_example_has_no_error(folder: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    assert {
        (score.examples, score.stderr)
        for score in evaluation.tasks(model, tokenizer, [str(folder / "own.jsonl")], limit=1)
    } == {(1, None)}


# --- refusals


def _refused(done: Result) -> str:
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return next(line for line in done.stderr.splitlines() if "error:" in line)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no question"),
        ("\n  \n", "no question"),
        ('{"query": "a?", "choices": ["b", "c"], "gold": 0}\n{"query": ', "line 2"),
        ("[1]", "line 1"),
        ('{"query": "a?", "choices": ["b", "c"]}', "no gold"),
        ('{"gold": 0}', "no query and no choices"),
        ('{"query": "a?", "choices": [], "gold": 0}', "choices in line 1"),
        ('{"query": "a?", "choices": ["b"], "gold": 0}', "choices in line 1"),
        ('{"query": "a?", "choices": ["b", ""], "gold": 0}', "choices in line 1"),
        ('{"query": "a?", "choices": "bc", "gold": 0}', "choices in line 1"),
        ('{"query": "a?", "choices": ["b", 3], "gold": 0}', "choices in line 1"),
        ('{"query": "a?", "choices": ["b", "\\ud800"], "gold": 0}', "half of a character"),
        ('{"query": " ", "choices": ["b", "c"], "gold": 0}', "query in line 1"),
        ('\n{"query": "a?", "choices": ["b", "c"], "gold": 2}', "gold in line 2"),
        ('{"query": "a?", "choices": ["b", "c"], "gold": -1}', "gold in line 1"),
        ('{"query": "a?", "choices": ["b", "c"], "gold": "0"}', "gold in line 1"),
        ('{"query": "a?", "choices": ["b", "c"], "gold": true}', "gold in line 1"),
    ],
)
def test_malformed_questions_are_refused(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(fasp_fx.ArgumentError, match=says):
        evaluation.tasks(torch.nn.Linear(1, 1), None, [str(file)])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "nothing to measure"),
        (["--task", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--task", "own.jsonl", "--limit", "0"], "--limit 0"),
        (["--task", "own.jsonl", "--batch-size", "0"], "--batch-size 0"),
        (["--text", "text.txt", "--length", "1"], "--length 1"),
        (["--text", "text.txt", "--length", "100000"], "less than one chunk"),
        (["--text", "text.txt", "--length", "200"], "128 positions"),
        (["--task", "own.jsonl", "--task", "own.jsonl"], "twice"),
        (["--task", "long.jsonl"], "128 positions"),
    ],
)
def test_bad_options_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], says: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "long.jsonl").write_text(
        json.dumps({"query": "why " * 40, "choices": ["b", "c"], "gold": 0}), encoding="utf-8"
    )
    assert says in _refused(_invoke("eval", "model", "--device", "cpu", *options))


def test_models_are_checked_before_anything_is_loaded(folder: Path) -> None:
    text = ["--text", folder / "text.txt"]
    assert "no model" in _refused(_invoke("eval", folder / "model", folder / "nowhere", *text))
    assert "twice" in _refused(_invoke("eval", folder / "model", folder / "model", *text))


def test_missing_harness_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasp_fx.cli.evaluation._harness.importlib.util.find_spec", lambda name: None)
    assert 'pip install "fasp_fx[eval]"' in _refused(
        _invoke("eval", folder / "model", "--task", folder / "own.jsonl")
    )


TASK = """
task: faraway
dataset_path: nobody/nothing
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
"""


def test_named_tasks_without_their_data(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    real = lm_eval.tasks.TaskManager
    # The index of the tasks that come with the harness takes long to read.
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_defaults: real(include_path=str(tmp_path), include_defaults=False),
    )
    (tmp_path / "faraway.yaml").write_text(TASK, encoding="utf-8")
    refused = _refused(_invoke("eval", folder / "model", "--task", "faraway"))
    assert "the data of the task 'faraway' cannot be had" in refused
    assert "hub" in refused
    assert "did you mean faraway" in _refused(_invoke("eval", folder / "model", "--task", "farawy"))
    assert "knows no task 'zzz'" in _refused(_invoke("eval", folder / "model", "--task", "zzz"))


def test_perplexity_is_that_of_evaluation_mode() -> None:
    class Noisy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.dropout = torch.nn.Embedding(16, 16), torch.nn.Dropout(0.5)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> CausalLMOutput:
            return CausalLMOutput(logits=self.dropout(self.table(input_ids)))

    model, chunks = Noisy().eval(), torch.randint(0, 16, (2, 9))
    expected = evaluation.perplexity(model, chunks)
    assert evaluation.perplexity(model.train(), chunks) == expected
    assert model.training
    assert model.dropout.training
