"""Text that a model writes itself, and the figures taken on text."""

import copy
import itertools

import pytest
import torch
from models import made as made_of
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from fasp_fx import ArgumentError, CalibrationError
from fasp_fx.hf import perplexity, write_texts
from fasp_fx.hf._own_text import _OPENINGS, sample, start_token


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    made = LlamaForCausalLM(config).eval()
    made.generation_config.temperature = 1e-4
    return made


def test_sampling_is_seeded_and_leaves_no_trace(model: LlamaForCausalLM) -> None:
    settings, state = model.generation_config, torch.get_rng_state()
    seen: list[float] = []
    first = sample(model, 0, 70, 12, seed=3, progress=seen.append)
    assert first.shape == (70, 12)
    assert bool((first[:, 0] == 0).all())
    assert (seen, seen[-1]) == (sorted(seen), pytest.approx(1))
    assert torch.equal(first, sample(model, 0, 70, 12, seed=3))
    assert not torch.equal(first, sample(model, 0, 70, 12, seed=4))
    assert model.generation_config is settings
    assert torch.equal(torch.get_rng_state(), state)


def test_texts_begin_as_they_are_told_to(model: LlamaForCausalLM) -> None:
    texts = sample(model, 0, 130, 6, openings=[[], [3], [2, 1]])
    assert (texts[1::3, 1] == 3).all()
    assert (texts[2::3, 1:3] == torch.tensor([2, 1])).all()
    assert len(texts[::3, 1].unique()) > 1
    assert sample(model, 0, 2, 2, openings=[[2, 1]])[:, 1].tolist() == [2, 2]


def test_texts_are_of_many_kinds_where_a_tokenizer_is_given(model: LlamaForCausalLM) -> None:
    def read(text: str, **how: bool) -> dict[str, list[int]]:
        assert how == {"add_special_tokens": False}
        return {"input_ids": [len(text) % 5]}

    texts = write_texts(model, read, 16, 4, seed=1, progress=False)
    assert texts[:, 1].tolist() == [len(one) % 5 for one in _OPENINGS]
    assert torch.equal(write_texts(model, count=3, length=4), sample(model, 0, 3, 4))


def test_what_writes_no_text_by_itself_is_refused(model: LlamaForCausalLM) -> None:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 8}
    other = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes))
    with pytest.raises(ArgumentError, match="T5ForConditionalGeneration writes only what a source asks for"):
        write_texts(other)
    with pytest.raises(ArgumentError, match="one text of two tokens at least"):
        write_texts(model, count=0)


def test_sampling_goes_past_the_end_token(model: LlamaForCausalLM) -> None:
    texts = sample(model, 0, 64, 20)
    after_end = [text[index + 1] for text in texts for index in range(1, 19) if text[index] == 1]
    assert len({int(token) for token in after_end}) == 5


def test_tokens_are_drawn_as_often_as_the_model_says(model: LlamaForCausalLM) -> None:
    """At temperature one, not at the 1e-4 of its own settings."""
    sharp = copy.deepcopy(model)
    with torch.no_grad():
        sharp.lm_head.weight.mul_(20)
        expected = sharp(input_ids=torch.tensor([[0]])).logits[0, -1].softmax(-1)
    assert expected.max() > 0.4
    count = 3200
    found = torch.bincount(sample(sharp, 0, count, 2)[:, 1], minlength=5) / count
    # Rounding of products adds to what chance does.
    assert bool(((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt() + 2e-3).all())


def test_a_model_that_breaks_down_on_its_own_text_is_refused(model: LlamaForCausalLM) -> None:
    broken, calls = copy.deepcopy(model), itertools.count(1)
    broken.lm_head.register_forward_hook(
        lambda module, args, logits: logits * (float("nan") if next(calls) > 5 else 1.0)
    )
    with pytest.raises(CalibrationError, match="not finite any more after 6 tokens"):
        sample(broken, 0, 3, 12)


def test_a_model_that_no_text_can_begin_is_refused(model: LlamaForCausalLM) -> None:
    other = copy.deepcopy(model)
    assert start_token(other, None) == 0
    other.config.bos_token_id = other.config.eos_token_id = 300
    other.generation_config.bos_token_id, other.generation_config.eos_token_id = None, [300]
    with pytest.raises(CalibrationError, match="none that the model knows"):
        start_token(other, None)


def test_perplexity_of_a_guess() -> None:
    """Each of four tokens is as likely, in evaluation mode."""
    model = made_of(
        lambda m, input_ids, use_cache: (m.dropout(m.table(input_ids)),),
        table=nn.Embedding(4, 4),
        dropout=nn.Dropout(0.5),
    ).train()
    nn.init.ones_(model.table.weight)
    assert perplexity(model, torch.randint(4, (3, 7))) == pytest.approx(4)
    assert model.training
    assert model.dropout.training
    with pytest.raises(ArgumentError, match="two tokens"):
        perplexity(model, torch.zeros(3, 1, dtype=torch.long))
