"""Multiple-choice questions as a task of lm-eval, and the answers of a model computed by hand: one call per
choice, without the harness.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fasp_fx.evaluation import TaskScore
from torch import Tensor

QUESTIONS: list[dict[str, Any]] = [
    {"query": "Question: what is ice?", "choices": ["water", "a stone that is very cold", "är"], "gold": 0},
    {"query": "Größe ", "choices": ["ß", "matters a lot", "no"], "gold": 1},
    {"query": "Question: which?", "choices": ["this one", "that"], "gold": 1},
    {"query": "Does it?", "choices": ["yes", "no", "perhaps it does, perhaps not"], "gold": 2},
    {"query": "One more:", "choices": ["ééé", "aaaaaa"], "gold": 0},
    {"query": "And more:", "choices": ["ééééééé", "aaaaaaaaa", "ö"], "gold": 1},
]
TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}]
"""


def write(file: Path) -> None:
    """As ``fasp-fx eval --task`` reads them."""
    data = file.with_suffix(".jsonl")
    data.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n", encoding="utf-8")
    file.write_text(TASK.format(data=data, cache=file.parent / "cache"), encoding="utf-8")


def by_hand(logits_of: Callable[[Tensor], Tensor], tokenizer: Any) -> dict[str, list[float]]:
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
            totals.append(
                sum(float(likelihoods[index - 1, ids[index]]) for index in range(len(start), len(ids)))
            )
        sizes = {
            "acc": [1] * len(totals),
            "acc_norm": map(len, question["choices"]),
            "acc_bytes": [len(choice.encode()) for choice in question["choices"]],
        }
        for name, divisors in sizes.items():
            each = [total / divisor for total, divisor in zip(totals, divisors)]
            right[name].append(float(each.index(max(each)) == question["gold"]))
    return right


def check(scores: Iterable[TaskScore], right: dict[str, list[float]], examples: int = len(QUESTIONS)) -> None:
    """Hold the scores of the task against the answers, of which the first ``examples`` count."""
    scores = list(scores)
    assert {(score.task, score.metric) for score in scores} == {("own", metric) for metric in right}
    for score in scores:
        answers = right[score.metric][:examples]
        mean = sum(answers) / examples
        assert score.value == pytest.approx(mean)
        assert score.examples == examples
        # The error of a mean of independent answers, by the textbook.
        assert score.stderr == pytest.approx(
            math.sqrt(sum((answer - mean) ** 2 for answer in answers) / (examples - 1) / examples)
        )
