"""A pruned module trains like any other: in a loop of one's own, and under transformers' Trainer."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracle import masked, removed_columns
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fasp_fx
from fasp_fx.testing.oracle import kept

pytestmark = pytest.mark.usefixtures("shared_captures")

VOCABULARY, STEPS, RATE = 40, 6, 0.1


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    """A Llama with grouped queries and tied embeddings, which makes no cache."""
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
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def once(dense: nn.Module) -> fasp_fx.Result:
    """Shared; tests train copies."""
    return fasp_fx.prune(dense, (), {"input_ids": _batch(0)}, score="random", restore=None, sparsity=0.3)


@pytest.fixture
def pruned(once: fasp_fx.Result) -> nn.Module:
    return copy.deepcopy(once.module)


def _batch(seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (4, 10), generator=torch.Generator().manual_seed(seed))


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _step(
    model: nn.Module,
    ids: Tensor,
    optimizer: torch.optim.Optimizer,
) -> float:
    loss = _loss(model(input_ids=ids).logits, ids)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _train(model: nn.Module) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    return [_step(model, _batch(seed), optimizer) for seed in range(STEPS)]


def test_steps_equal_those_of_the_masked_dense_model(
    dense: nn.Module, once: fasp_fx.Result, pruned: nn.Module
) -> None:
    whole = copy.deepcopy(dense)
    with masked(whole, removed_columns(once.plan, dense)):
        expected_losses = _train(whole)
    assert _train(pruned) == pytest.approx(expected_losses, rel=1e-4)
    trained = dict(pruned.named_parameters())
    masks = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in whole.named_parameters()}
    for part in (part for group in once.plan.groups for part in (*group.consumers, *group.producers)):
        masks[part.name] &= kept(masks[part.name], part)
    assert trained.keys() == masks.keys()
    for name, weight in whole.named_parameters():
        assert not torch.equal(weight, dense.get_parameter(name)), f"{name} was not trained"
        torch.testing.assert_close(
            trained[name], weight[masks[name]].reshape(trained[name].shape), rtol=1e-4, atol=1e-5
        )


@pytest.fixture
def trained_in_place(once: fasp_fx.Result) -> Iterator[fasp_fx.Result]:
    """The shared result itself, whose weights are put back."""
    weights = {name: weight.detach().clone() for name, weight in once.module.named_parameters()}
    yield once
    with torch.no_grad():
        for name, weight in once.module.named_parameters():
            weight.copy_(weights[name])


def test_documentation_runs_as_printed(
    trained_in_place: fasp_fx.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    loop, _, trainer = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    examples = [{"input_ids": row[:-1], "labels": row[1:]} for row in _batch(0)]
    names = {
        "torch": torch,
        "result": trained_in_place,
        "batches": [_batch(0)] * 3,
        "examples": examples,
        "Trainer": Trainer,
    }
    before = _loss(trained_in_place.module(input_ids=_batch(0)).logits, _batch(0))
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
        logits = fasp_fx.load(folder / "tuned").module(input_ids=_batch(0)).logits
        after = _loss(logits, _batch(0))
        assert after < before
        before = after
