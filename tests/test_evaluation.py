"""Zero-shot tasks: figures against log-likelihoods computed by hand, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import fasp_fx
from fasp_fx import evaluation
from fasp_fx.cli import app

pytest.importorskip("lm_eval")

QUESTIONS: list[dict[str, Any]] = [
    {"query": "Question: what is ice?", "choices": ["water", "a stone that is very cold", "är"], "gold": 0, "id": 7},
    {"query": "Größe ", "choices": ["ß", "matters a lot", "no"], "gold": 1, "id": "seven"},
    {"query": "Question: which?", "choices": ["this one", "that"], "gold": 1},
    {"query": "Does it?", "choices": ["yes", "no", "perhaps it does, perhaps not"], "gold": 2},
    {"query": "One more:", "choices": ["ééé", "aaaaaa"], "gold": 0},
    {"query": "And more:", "choices": ["ééééééé", "aaaaaaaaa", "ö"], "gold": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("evaluation")
    make_model(made / "model")
    (made / "text.txt").write_text("Größe matters: a smaller model answers sooner. " * 12, encoding="utf-8")
    (made / "own.jsonl").write_text("\n".join(json.dumps(question) for question in QUESTIONS) + "\n\n", encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def pruned(folder: Path) -> Path:
    """The folder of a pruned model as the command line writes it."""
    options = ["--length", "32", "--batches", "4", "--eval-batches", "3", "--round-to", "1", "--device", "cpu", "--sparsity", "0.3"]
    done = _invoke("prune", folder / "model", "--out", folder / "small", *options)
    assert done.exit_code == 0, done.output
    return folder / "small"


def _invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _by_hand(logits_of: Any, tokenizer: Any) -> dict[str, list[float]]:
    """Whether each question is answered rightly, from one call per choice."""
    right: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for question in QUESTIONS:
        query = question["query"].rstrip()
        space = question["query"][len(query) :]
        start = tokenizer(query)["input_ids"]
        totals = []
        for choice in question["choices"]:
            ids = torch.tensor(tokenizer(f"{query}{space} {choice}")["input_ids"])
            with torch.no_grad():
                likelihoods = torch.log_softmax(logits_of(ids[None])[0, :-1].double(), dim=-1)
            totals.append(sum(float(likelihoods[index - 1, ids[index]]) for index in range(len(start), len(ids))))
        sizes = {"acc": [1] * len(totals), "acc_norm": map(len, question["choices"]), "acc_bytes": [len(choice.encode()) for choice in question["choices"]]}
        for name, divisors in sizes.items():
            each = [total / divisor for total, divisor in zip(totals, divisors)]
            right[name].append(float(each.index(max(each)) == question["gold"]))
    return right


def _check(scores: list[evaluation.TaskScore], right: dict[str, list[float]], examples: int) -> None:
    assert {(score.task, score.metric) for score in scores} == {("own.jsonl", metric) for metric in right}
    for score in scores:
        answers = right[score.metric][:examples]
        mean = sum(answers) / examples
        assert score.value == pytest.approx(mean)
        assert score.examples == examples
        # The error of a mean of independent answers, by the textbook.
        assert score.stderr == pytest.approx(math.sqrt(sum((answer - mean) ** 2 for answer in answers) / (examples - 1) / examples))


def test_own_questions_of_a_dense_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    fractions: list[float] = []
    scores = evaluation.tasks(model, tokenizer, [str(folder / "own.jsonl")], batch_size=3, progress=fractions.append)
    right = _by_hand(lambda ids: model(input_ids=ids).logits, tokenizer)
    assert len({tuple(answers) for answers in right.values()}) == 3  # the three metrics are told apart
    _check(scores, right, len(QUESTIONS))
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert [module.training for module in model.modules()] == modes
    assert tokenizer.pad_token is None


def test_own_questions_of_dense_and_pruned_side_by_side(folder: Path, pruned: Path) -> None:
    arguments = ["eval", folder / "model", pruned, "--task", folder / "own.jsonl", "--text", folder / "text.txt", "--length", "32", "--device", "cpu"]
    done = _invoke(*arguments, "--limit", "4", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    dense, small = AutoModelForCausalLM.from_pretrained(folder / "model").eval(), fasp_fx.load(pruned).module
    assert [entry["model"] for entry in found["models"]] == [str(folder / "model"), str(pruned)]
    for entry, model in zip(found["models"], (dense, small)):
        right = _by_hand(lambda ids, model=model: model(input_ids=ids, use_cache=False).logits, tokenizer)
        _check([evaluation.TaskScore(**score) for score in entry["tasks"]], right, 4)
        alone = _invoke("eval", entry["model"], "--text", folder / "text.txt", "--length", "32", "--device", "cpu")
        assert float(alone.stdout.split()[1]) == pytest.approx(entry["perplexity"], rel=1e-4)
    table = _invoke(*arguments)
    assert table.exit_code == 0, table.output
    for words in ("model", "small", "change", "perplexity on chunks 0 to", "own.jsonl: acc_bytes of 6 examples", " ± "):
        assert words in table.stdout


def test_limit_beyond_the_file_takes_all(folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model"), AutoTokenizer.from_pretrained(folder / "model")
    assert {score.examples for score in evaluation.tasks(model, tokenizer, [str(folder / "own.jsonl")], limit=99)} == {len(QUESTIONS)}


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
def test_bad_options_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], says: str) -> None:
    monkeypatch.chdir(folder)
    (folder / "long.jsonl").write_text(json.dumps({"query": "why " * 40, "choices": ["b", "c"], "gold": 0}), encoding="utf-8")
    assert says in _refused(_invoke("eval", "model", "--device", "cpu", *options))


def test_models_are_checked_before_anything_is_loaded(folder: Path) -> None:
    text = ["--text", folder / "text.txt"]
    assert "no model" in _refused(_invoke("eval", folder / "model", folder / "nowhere", *text))
    assert "twice" in _refused(_invoke("eval", folder / "model", folder / "model", *text))


def test_missing_harness_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasp_fx._harness.importlib.util.find_spec", lambda name: None)
    assert 'pip install "fasp_fx[eval]"' in _refused(_invoke("eval", folder / "model", "--task", folder / "own.jsonl"))


TASK = """
task: faraway
dataset_path: nobody/nothing
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
"""


def test_named_tasks_without_their_data(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    real = lm_eval.tasks.TaskManager
    # The index of the tasks that come with the harness takes long to read.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_defaults: real(include_path=str(tmp_path), include_defaults=False))
    (tmp_path / "faraway.yaml").write_text(TASK, encoding="utf-8")
    refused = _refused(_invoke("eval", folder / "model", "--task", "faraway"))
    assert "the data of the task 'faraway' cannot be had" in refused
    assert "hub" in refused
    assert "did you mean faraway" in _refused(_invoke("eval", folder / "model", "--task", "farawy"))
    assert "knows no task 'zzz'" in _refused(_invoke("eval", folder / "model", "--task", "zzz"))
