"""A pruned model beside ``generate()``: arguments, training, moving, and what it refuses."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from generators import dense, pruned
from models import randomise
from oracle import error, zeroed
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    DogeConfig,
    DogeForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    StaticCache,
    TrOCRConfig,
    TrOCRForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import fasp_fx
from fasp_fx import hf
from fasp_fx.base import CACHE
from fasp_fx.pruning import check as _check
from fasp_fx.pruning.check._compare import Seen


@pytest.fixture(scope="module")
def model() -> Any:
    return pruned("llama_gqa").model


def _ids(batch: int = 2, tokens: int = 7) -> torch.Tensor:
    return torch.randint(2, 96, (batch, tokens), generator=torch.Generator().manual_seed(1))


def test_forward_without_a_cache_is_the_masked_dense_forward(model: Any) -> None:
    original, ids = dense("llama_gqa"), _ids()
    with torch.no_grad():
        wanted = zeroed(original, pruned("llama_gqa").plan)(input_ids=ids, labels=ids)
    found = model(input_ids=ids, labels=ids)
    assert torch.allclose(found.logits, wanted.logits, rtol=1e-9, atol=1e-9)
    assert torch.allclose(found.loss, wanted.loss)
    some = model(input_ids=ids, logits_to_keep=2).logits
    assert torch.allclose(some, wanted.logits[:, -2:], rtol=1e-9, atol=1e-9)
    assert getattr(model(input_ids=ids, use_cache=False), CACHE) is None
    assert isinstance(model(input_ids=ids, return_dict=False), tuple)


def test_continued_with_a_cache_of_any_length(model: Any) -> None:
    ids = _ids(1, 9)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        for cut in ([9], [1, 8], [4, 1, 4], [8, 1]):
            cache, found = DynamicCache(), []
            for piece in ids.split(cut, 1):
                found.append(model(input_ids=piece, cache=cache).logits)
            assert torch.allclose(torch.cat(found, 1), whole, rtol=1e-9, atol=1e-9), cut
            assert cache.get_seq_length() == 9


def test_training_step(model: Any) -> None:
    """All weights get gradients, and a step with a cache sees what was made of them."""
    trained, ids = copy.deepcopy(model).train(), _ids(2, 12)
    trained(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.sub_(0.05 * parameter.grad)
        step = trained(input_ids=ids[:, -1:], cache=trained(input_ids=ids[:, :-1])[CACHE]).logits
        assert torch.allclose(step, trained(input_ids=ids).logits[:, -1:], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(step, model(input_ids=ids).logits[:, -1:])


def test_names_of_weights_are_those_of_the_original(model: Any) -> None:
    assert list(model.state_dict()) == list(dense("llama_gqa").state_dict())
    assert model.num_parameters() == pruned("llama_gqa").report.parameters[1]


def test_copies_are_models_of_their_own_and_move(model: Any) -> None:
    ids, made = _ids(), copy.deepcopy(model)
    next(iter(made.parameters())).detach().zero_()
    assert not torch.equal(made(input_ids=ids).logits, model(input_ids=ids).logits)
    moved = made.to("meta")
    for tokens in (7, 1):
        assert moved(input_ids=_ids(2, tokens).to("meta")).logits.shape == (2, tokens, 258)


def test_it_compiles_and_another_text_compiles_nothing_anew(model: Any) -> None:
    counter = CompileCounter()
    compiled = torch.compile(model.forward, backend=counter, dynamic=True)
    seen = []
    with torch.no_grad():
        for length in (5, 7, 6):
            ids = _ids(1)[:, :length]
            cache = compiled(input_ids=ids[:, :-1], cache=DynamicCache())[CACHE]
            found = compiled(input_ids=ids[:, -1:], cache=cache).logits
            assert torch.allclose(found, model(input_ids=ids).logits[:, -1:], rtol=1e-9, atol=1e-9)
            seen.append(counter.frame_count)
    assert seen[1] == seen[2], "a compiled forward holds for every cache, not for the one it first saw"


def _narrow() -> DynamicCache:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(
            torch.zeros(2, 2, 3, 16, dtype=torch.float64),
            torch.zeros(2, 2, 3, 16, dtype=torch.float64),
            layer,
        )
    return cache


BAD: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "attentions": (lambda: {"input_ids": _ids(), "output_attentions": True}, "output_attentions"),
    "embeddings": (lambda: {"inputs_embeds": torch.zeros(1, 2, 64)}, "inputs_embeds"),
    "nothing": (lambda: {}, "input_ids"),
    "no tokens": (lambda: {"input_ids": _ids()[:, :0]}, "at least one token"),
    "numbers that are none": (lambda: {"input_ids": torch.zeros(2, 3)}, "token numbers"),
    "short mask": (lambda: {"input_ids": _ids(), "attention_mask": torch.ones(2, 3)}, r"\[2, 7\]"),
    "positions": (
        lambda: {"input_ids": _ids(), "position_ids": torch.zeros(2, 3, dtype=torch.long)},
        "position_ids",
    ),
    "cache of the dense width": (
        lambda: {"input_ids": _ids(), "cache": _narrow()},
        r"cache.0.values .* 12\]",
    ),
    "cache of another batch": (lambda: {"input_ids": _ids(3), "cache": _narrow()}, r"\[3, 2, any"),
    "static cache": (
        lambda: {
            "input_ids": _ids(),
            "cache": StaticCache(config=dense("llama_gqa").config, max_cache_len=20),
        },
        "StaticCache",
    ),
    "numbers of another type": (lambda: {"input_ids": _ids().short()}, "torch.int16"),
    "a list as mask": (
        lambda: {"input_ids": _ids(), "attention_mask": [[1] * 7] * 2},
        "attention_mask is a list",
    ),
    "positions in a list": (
        lambda: {"input_ids": _ids(), "position_ids": [[1] * 7]},
        "position_ids is a list",
    ),
    "labels": (lambda: {"input_ids": _ids(), "labels": _ids(2, 3)}, "labels"),
    "labels in a list": (lambda: {"input_ids": _ids(), "labels": _ids().tolist()}, "labels is a list"),
    "labels with a fraction": (
        lambda: {"input_ids": _ids(), "labels": _ids().double()},
        "labels is torch.float64",
    ),
    "logits of a longer mask": (
        lambda: {"input_ids": _ids(), "logits_to_keep": torch.ones(9, dtype=torch.bool)},
        r"logits_to_keep is torch.bool \[9\]",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_calls_are_refused(model: Any, case: str) -> None:
    arguments, says = BAD[case]
    with pytest.raises(fasp_fx.ArgumentError, match=says):
        model(**arguments())


BAD_USES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a static cache": (
        lambda model: model.generate(_ids(), cache_implementation="static", max_new_tokens=2),
        "static",
    ),
    "a paged cache": (lambda model: model.generate_batch([[1, 2]]), "paged cache"),
    "another dtype": (lambda model: copy.deepcopy(model).half(), "float16"),
}


@pytest.mark.parametrize("case", BAD_USES)
def test_bad_uses_are_refused(model: Any, case: str) -> None:
    use, says = BAD_USES[case]
    with pytest.raises(fasp_fx.ArgumentError, match=says):
        use(model)
    assert model.dtype == torch.float64


def test_a_model_that_does_otherwise_with_more_tokens_is_given_no_more(tmp_path: Path) -> None:
    """Doge keeps so many tokens, the ones that matter most, once there are more."""
    config = DogeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        keep_window_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    original = randomise(DogeForCausalLM(config), seed=3).double()
    result = hf.prune(original, sparsity=0.1, score="magnitude", restore=None, format="fasp-fx")
    result.save_pretrained(tmp_path / "saved")
    smaller = zeroed(original, result.plan)
    for made in (result.model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        for tokens in (1, 16):
            ids = _ids(tokens=tokens)
            assert error(made(input_ids=ids).logits, smaller(input_ids=ids).logits) < 1e-6
        cache = made(input_ids=_ids(tokens=10), use_cache=True)[CACHE]
        made(input_ids=_ids(tokens=6), **{CACHE: cache})
        said = "hold 17 tokens, and the program takes 16 at most"
        for tokens, given in ((1, {CACHE: cache}), (17, {})):
            with pytest.raises(fasp_fx.ArgumentError, match=said):
                made(input_ids=_ids(tokens=tokens), **given)


def test_last_logits_of_a_model_that_gives_all_of_them() -> None:
    config = TrOCRConfig(
        vocab_size=96,
        d_model=32,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
    )
    original = randomise(TrOCRForCausalLM(config), seed=3).double()
    made = hf.prune(original, sparsity=0.1, score="magnitude", restore=None, format="fasp-fx").model
    ids = _ids(tokens=4)
    assert torch.equal(made(input_ids=ids, logits_to_keep=3).logits, made(input_ids=ids).logits[:, 1:])


@pytest.fixture(scope="module")
def bart() -> tuple[Any, hf.CapturedModel, hf.Pruned]:
    """An encoder-decoder whose configuration has a field with the name of a parameter of generation,
    ``forced_eos_token_id``.
    """
    layers = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))
    }
    config = BartConfig(
        vocab_size=96,
        d_model=32,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        decoder_start_token_id=2,
        **layers,
    )
    original = randomise(BartForConditionalGeneration(config), seed=3).double()
    once = hf.capture(original)
    return original, once, hf.prune(once, sparsity=0.2, score="magnitude", restore=None)


def test_what_one_program_cannot_lose_is_refused(
    bart: tuple[Any, hf.CapturedModel, hf.Pruned], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The programs of one model share their weights. The comparison fails where a weight of the encoder is
    smaller, in all programs but the planned one.
    """
    original, weight = _check.compare, "model.encoder.layers.0.fc2.weight"

    def compare(reference: Any, module: Any, pruned: Any, inputs: Any) -> Seen:
        ours, theirs = pruned.weights().get(weight), reference.weights().get(weight)
        is_planned = any("decoder" in node.name for node in reference.placeholders())
        lost = not is_planned and ours is not None and theirs is not None and ours.shape != theirs.shape
        return Seen(0.5, False) if lost else original(reference, module, pruned, inputs)

    monkeypatch.setattr(_check, "compare", compare)
    with pytest.raises(
        fasp_fx.VerificationError, match="the program 'encode' of the model cannot lose what the plan removes"
    ):
        hf.prune(bart[1], sparsity=0.2, score="magnitude", restore=None)


def test_fields_of_the_original_may_be_named_like_parameters_of_generation(
    bart: tuple[Any, hf.CapturedModel, hf.Pruned], tmp_path: Path
) -> None:
    original, _, result = bart
    assert original.config.forced_eos_token_id == 2
    ids = _ids()
    wanted = zeroed(original, result.plan).generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(result.model.generate(ids, max_new_tokens=12, do_sample=False), wanted)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(result.save_pretrained(tmp_path / "bart"))
    assert torch.equal(loaded.generate(ids, max_new_tokens=12, do_sample=False), wanted)


BAD_ENCODED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "nothing": (lambda model: (), "holds a tuple"),
    "a tensor": (lambda model: torch.zeros(2, 7, 32, dtype=torch.float64), "pass what get_encoder"),
    "another width": (lambda model: (torch.zeros(2, 7, 5, dtype=torch.float64),), r"\[2, source, 32\]"),
    "another batch": (lambda model: (torch.zeros(3, 7, 32, dtype=torch.float64),), "for 2 sequences"),
    "another type": (lambda model: (torch.zeros(2, 7, 32),), "torch.float64"),
}


@pytest.mark.parametrize("case", BAD_ENCODED, ids=str)
def test_bad_encoder_outputs_are_refused(bart: tuple[Any, hf.CapturedModel, hf.Pruned], case: str) -> None:
    encoded, says = BAD_ENCODED[case]
    model = bart[2].model
    with pytest.raises(fasp_fx.ArgumentError, match=says):
        model(encoder_outputs=encoded(model), decoder_input_ids=_ids(2, 3))


def test_a_cache_of_another_source_is_refused(bart: tuple[Any, hf.CapturedModel, hf.Pruned]) -> None:
    model, one = bart[2].model, _ids(2, 1)
    cache = model(input_ids=_ids(), decoder_input_ids=_ids(2, 3))[CACHE]
    alone = EncoderDecoderCache(cache.self_attention_cache, DynamicCache())
    for ids, given, said in (
        (_ids(2, 4), {"decoder_input_ids": one, "cache": cache}, "7 tokens of the source, encoder_outputs 4"),
        (_ids(), {"decoder_input_ids": one, "cache": alone}, "nothing of the source"),
        (_ids(), {"labels": _ids()[0]}, "labels is"),
    ):
        with pytest.raises(fasp_fx.ArgumentError, match=said):
            model(input_ids=ids, **given)


@pytest.mark.slow
@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch does not export angles that the length of the text decides"
)
def test_a_buffer_that_a_program_writes_is_no_other(tmp_path: Path) -> None:
    """LongRoPE keeps the angles in use in a buffer, which begins as a copy of those for short texts."""
    angles = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 16,
    }
    config = Phi3Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        pad_token_id=0,
        rope_parameters=angles,
    )
    original = randomise(Phi3ForCausalLM(config), seed=3).double()
    result = hf.prune(original, sparsity=0.2, score="magnitude", restore=None, format="fasp-fx")
    loaded = AutoModelForCausalLM.from_pretrained(result.save_pretrained(tmp_path / "long"))
    for model in (result.model, loaded):
        for length in (10, 40, 10):
            ids = _ids(2, length)
            with torch.no_grad():
                wanted = zeroed(original, result.plan)(input_ids=ids, use_cache=False).logits
            assert torch.allclose(model(input_ids=ids).logits, wanted, rtol=1e-9, atol=1e-9), length


def test_a_padded_prompt_may_be_as_long_as_the_table(model: Any) -> None:
    gpt2 = pruned("gpt2").model
    mask = torch.ones(1, 130, dtype=torch.long)
    mask[0, :4] = 0
    assert gpt2.generate(_ids(1, 130), attention_mask=mask, max_new_tokens=2, do_sample=False).shape == (
        1,
        132,
    )


def _whisper() -> Any:
    config = WhisperConfig(
        vocab_size=96,
        d_model=16,
        num_mel_bins=8,
        max_source_positions=20,
        pad_token_id=0,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_layers=1,
        decoder_layers=1,
    )
    return WhisperForConditionalGeneration(config).eval()


BAD_PRUNING: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "not a model that generates": (lambda: hf.prune(torch.nn.Linear(2, 2)), fasp_fx.ArgumentError, "Linear"),
    "not one that reads tokens": (lambda: hf.prune(_whisper()), fasp_fx.ArgumentError, "input_features"),
    "one that was pruned before": (
        lambda: hf.prune(pruned("gpt2").model),
        fasp_fx.ArgumentError,
        "pruned already",
    ),
    "unknown option": (lambda: hf.prune(dense("llama_gqa"), state=("x",)), fasp_fx.ArgumentError, "option"),
    "batches in the tokenizer's place": (
        lambda: hf.prune(dense("llama_gqa"), [_ids()]),
        fasp_fx.ArgumentError,
        "tokenizer is a list.*calibration=",
    ),
    "calibration that is none": (
        lambda: hf.prune(dense("llama_gqa"), calibration=5),
        fasp_fx.CalibrationError,
        "a single int|is a int",
    ),
    "positions for a model that takes none": (
        lambda: hf.prune(
            dense("bloom"), calibration=[{"input_ids": _ids(), "position_ids": torch.arange(7).expand(2, 7)}]
        ),
        fasp_fx.CalibrationError,
        "holds position_ids; a batch holds attention_mask, input_ids",
    ),
    "no calibration": (lambda: hf.prune(dense("llama_gqa")), fasp_fx.CalibrationError, "calibration"),
    "one batch": (
        lambda: hf.prune(dense("llama_gqa"), calibration=_ids()),
        fasp_fx.CalibrationError,
        "iterable of batches",
    ),
    "strange batch": (
        lambda: hf.prune(
            dense("llama_gqa"), calibration=[{"input_ids": _ids(), "pixels": 1}], format="fasp-fx"
        ),
        fasp_fx.CalibrationError,
        "pixels",
    ),
    "sparsity": (lambda: hf.prune(dense("llama_gqa"), sparsity=2), fasp_fx.SparsityError, "sparsity"),
}


@pytest.mark.parametrize(
    "case",
    [
        *list(BAD_PRUNING)[:5],
        "sparsity",
        *[pytest.param(name, marks=pytest.mark.slow) for name in list(BAD_PRUNING)[5:-1]],
    ],
)
def test_bad_pruning_is_refused(case: str) -> None:
    call, kind, says = BAD_PRUNING[case]
    with pytest.raises(kind, match=says):
        call()


def test_configuration_speaks_for_the_original(model: Any) -> None:
    config = model.config
    assert (config.vocab_size, config.num_hidden_layers, config.hidden_size) == (258, 2, 64)
    assert pruned("gpt2").model.config.hidden_size == 64  # a name that GPT-2 maps to another
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = config.no_such_thing


STATE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
STATES: dict[str, tuple[Any, Any, str]] = {
    "Mamba": (MambaForCausalLM, MambaConfig(**STATE, state_size=4), "its layers keep a LinearAttentionLayer"),
    "RecurrentGemma": (
        RecurrentGemmaForCausalLM,
        RecurrentGemmaConfig(**STATE, num_attention_heads=2, intermediate_size=16, lru_width=16),
        "its layers keep a LinearAttentionLayer",
    ),
}


@pytest.mark.parametrize("family", STATES)
def test_a_model_that_generates_from_states_is_refused_in_words(family: str) -> None:
    kind, config, why = STATES[family]
    with pytest.raises(fasp_fx.CaptureError, match=rf"{family}ForCausalLM.*{why}; use fasp_fx\.prune"):
        hf.prune(kind(config).eval(), calibration=[torch.randint(0, 32, (2, 8))], format="fasp-fx")


# --- what a model does with labels, masks and positions beside its tokens is what its pruned one does, or the


SIZES = {
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART = SIZES | {
    "d_model": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
}
LLAMA = SIZES | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (batch, count), generator=torch.Generator().manual_seed(seed))


def smaller(model: Any) -> tuple[Any, nn.Module]:
    """The model pruned, and with zeros in its place."""
    result = hf.prune(model, score="magnitude", restore=None, sparsity=0.1, format="fasp-fx")
    return result, zeroed(model, result.plan)


def made(kind: str, config: Any) -> Any:
    return randomise(getattr(transformers, kind)(config), std=0.2).eval()


IDS, LABELS = tokens(2, 9), tokens(2, 5, 1)
LABELS[0, 4:] = -100
MASK = torch.arange(9) >= torch.tensor([[4], [0]])
OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48} | SIZES
#: the class and the configuration of a model, and what it is called with
HABITS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "labels that are moved on": (
        "BartForConditionalGeneration",
        lambda: transformers.BartConfig(**BART, encoder_ffn_dim=48, decoder_start_token_id=2),
        {"input_ids": IDS, "labels": LABELS},
    ),
    "a loss at its place, and weights that no program reads": (
        "BartForCausalLM",
        lambda: transformers.BartConfig(**BART, encoder_ffn_dim=48),
        {"input_ids": IDS, "labels": IDS, "use_cache": False},
    ),
    "positions of hidden tokens": (
        "OPTForCausalLM",
        lambda: transformers.OPTConfig(**OPT, num_hidden_layers=1, num_attention_heads=4),
        {"input_ids": IDS, "attention_mask": MASK.long(), "labels": IDS.masked_fill(~MASK, -100)},
    ),
    "a loss that is divided": (
        "LlamaForCausalLM",
        lambda: transformers.LlamaConfig(**LLAMA),
        {"input_ids": IDS, "labels": IDS, "num_items_in_batch": torch.tensor(1000), "use_cache": False},
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(next(iter(HABITS)), marks=pytest.mark.slow), *list(HABITS)[1:]]
)
def test_a_pruned_model_does_as_the_model_does(name: str, tmp_path: Path) -> None:
    kind, config, given = HABITS[name]
    result, model = smaller(made(kind, config()))
    with torch.no_grad():
        found, expected = (called(**given) for called in (result.model, model))
    assert torch.allclose(found.logits, expected.logits, atol=1e-4)
    assert torch.allclose(found.loss, expected.loss, atol=1e-4)
    reader = AutoModelForSeq2SeqLM if "Conditional" in kind else AutoModelForCausalLM
    loaded = reader.from_pretrained(result.save_pretrained(tmp_path / "saved"))
    assert torch.equal(loaded(**given).loss, found.loss)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        moved = (one.prepare_decoder_input_ids_from_labels(LABELS) for one in (result.model, model))
        assert torch.equal(*moved)


def test_packed_texts_are_refused_where_the_model_keeps_them_apart() -> None:
    result, model = smaller(made("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA)))
    pruned = result.model
    ids, positions = tokens(1, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        apart, together = (
            model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
            for mask in (None, torch.ones_like(ids))
        )
        assert not torch.allclose(apart, together, atol=1e-3)
        with pytest.raises(fasp_fx.ArgumentError, match="begin again"):
            pruned(input_ids=ids, position_ids=positions)
        assert torch.allclose(
            pruned(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits,
            together,
            atol=1e-4,
        )
        assert torch.allclose(
            pruned(input_ids=ids, position_ids=3 + torch.arange(9)[None]).logits,
            model(input_ids=ids).logits,
            atol=1e-4,
        )


def test_a_loss_of_the_models_own_is_refused() -> None:
    class Own(transformers.LlamaForCausalLM):
        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            cache: Any = None,
            past_key_values: Any = None,
            labels: Tensor | None = None,
            use_cache: bool | None = None,
            logits_to_keep: int | Tensor = 0,
            **given: Any,
        ) -> Any:
            given |= {CACHE: cache if CACHE == "cache" else past_key_values}
            given |= {"position_ids": position_ids, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
            output = super().forward(input_ids, attention_mask, **given)
            output.loss = None if labels is None else output.logits.square().mean()
            return output

    pruned = hf.prune(
        randomise(Own(transformers.LlamaConfig(**LLAMA)), std=0.2).eval(),
        sparsity=0.2,
        score="magnitude",
        restore=None,
        format="fasp-fx",
    ).model
    assert pruned(input_ids=tokens(1, 5)).loss is None
    with pytest.raises(fasp_fx.ArgumentError, match="loss of its own"):
        pruned(input_ids=tokens(1, 5), labels=tokens(1, 5))


def test_outputs_of_routers_are_refused_with_the_remedy() -> None:
    config = transformers.MixtralConfig(
        **LLAMA, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True
    )
    with pytest.raises(fasp_fx.ArgumentError, match="output_router_logits = False"):
        hf.prune(
            made("MixtralForCausalLM", config),
            sparsity=0.2,
            score="magnitude",
            restore=None,
            format="fasp-fx",
        )
