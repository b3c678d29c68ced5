"""A pruned module trains like any other: in a loop of one's own, and under transformers' Trainer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fasp_fx

VOCABULARY = 40
BATCH = torch.randint(0, VOCABULARY, (4, 10), generator=torch.Generator().manual_seed(0))


def _pruned() -> fasp_fx.Result:
    """Of a Llama with grouped queries and tied embeddings, which makes no cache."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(
        vocab_size=VOCABULARY, **shape, tie_word_embeddings=True, use_cache=False, initializer_range=0.2
    )
    model = LlamaForCausalLM(config).eval()
    return fasp_fx.prune(model, (), {"input_ids": BATCH}, score="random", restore=None, sparsity=0.3)


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def test_documentation_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    loop, _, trainer = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    examples = [{"input_ids": row[:-1], "labels": row[1:]} for row in BATCH]
    result = _pruned()
    names = {
        "torch": torch,
        "result": result,
        "batches": [BATCH] * 3,
        "examples": examples,
        "Trainer": Trainer,
    }
    before = _loss(result.module(input_ids=BATCH).logits, BATCH)
    for part in (loop, trainer):
        folder = tmp_path / ("loop" if part is loop else "trainer")
        folder.mkdir()
        monkeypatch.chdir(folder)
        exec(
            part,
            names
            | {
                "TrainingArguments": lambda *args, **options: TrainingArguments(
                    *args, use_cpu=True, report_to=[], **options
                )
            },
        )
        logits = fasp_fx.load(folder / "tuned").module(input_ids=BATCH).logits
        after = _loss(logits, BATCH)
        assert after < before
        before = after
