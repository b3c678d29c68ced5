"""Token for token what the masked dense Hugging Face model generates.

Every model of the issue in every way of generating: ``FASP_FX_PROFILE=slow pytest
tests/hf/test_generation.py``.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import TOKENS, Case, dense, expected, pruned
from hypothesis import given, strategies as st
from models import ZOO, make_model
from oracle import zeroed
from test_cli import failed, invoke, printed, refused
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import fasp_fx
from fasp_fx import hf
from fasp_fx.allocation import Search
from fasp_fx.base import CACHE
from fasp_fx.cli._prune import training_steps

pytestmark = [pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning")]


CASES = [Case(batch, beams) for batch in (1, 4) for beams in (1, 3)]
NAMES = ("llama_gqa", "gpt2", "opt", "qwen3", "gemma2", "t5")
#: what runs in every profile
FAST = {*(("llama_gqa", case) for case in (Case(1, 1), Case(4, 3))), ("gpt2", Case(4, 1))}


def _marked(name: str, case: Case) -> Any:
    return pytest.param(
        name,
        case,
        marks=() if (name, case) in FAST else pytest.mark.slow,
        id=f"{name}-batch{case.batch}-beams{case.beams}",
    )


@pytest.mark.parametrize(("name", "case"), [_marked(name, case) for name in NAMES for case in CASES])
def test_same_tokens_as_the_masked_dense_model(name: str, case: Case) -> None:
    wanted = expected(name, case)
    assert torch.equal(case.run(pruned(name).model, name), wanted)
    if case.beams == 1:
        assert wanted.shape[1] >= TOKENS
        assert not torch.equal(wanted, case.run(dense(name), name)), (
            "pruning changes nothing that can be seen"
        )


@pytest.mark.parametrize("name", ["llama_gqa", pytest.param("t5", marks=pytest.mark.slow)])
def test_what_stop_strings_need_reaches_no_program(name: str) -> None:
    model, inputs = pruned(name).model, Case(1, 1).inputs(name)
    prepared = model.prepare_inputs_for_generation(
        inputs["input_ids"], tokenizer=object(), assistant_tokenizer=object()
    )
    assert not {"tokenizer", "assistant_tokenizer"} & prepared.keys()


@pytest.mark.parametrize(
    "name", ["llama_gqa", "gpt2", *[pytest.param(name, marks=pytest.mark.slow) for name in NAMES[2:]]]
)
def test_cache_is_narrower_by_what_the_report_says(name: str) -> None:
    result = pruned(name)
    assert result.report.cache is not None
    sizes = []
    for model in (dense(name), result.model):
        inputs = Case(1, 1).inputs(name)
        if name == "t5":
            inputs["decoder_input_ids"] = inputs["input_ids"]
        cache = model(**inputs, use_cache=True)[CACHE]
        parts = [cache.self_attention_cache, cache.cross_attention_cache] if name == "t5" else [cache]
        sizes.append(
            sum(
                tensor[0, :, 0].nbytes
                for part in parts
                for layer in part.layers
                for tensor in (layer.keys, layer.values)
            )
        )
    assert result.report.cache == tuple(sizes)
    assert sizes[1] < sizes[0]
    assert f"{sizes[0]:,} -> {sizes[1]:,} bytes per token" in str(result.report)


@pytest.mark.parametrize(
    "name", ["llama_gqa", *[pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "t5")]]
)
def test_whole_heads_go_from_weights_and_cache(name: str) -> None:
    """Rotary angles come from an input here, so that they are channels too, which all heads share."""
    made = hf.prune(
        dense(name), granularity=("head",), sparsity=0.1, score="random", restore=None, format="fasp-fx"
    )
    assert {group.granularity for group in made.plan.groups} == {"head"}
    assert made.report.cache is not None
    assert made.report.cache[1] < made.report.cache[0]
    model = dense(name)
    wanted = Case(4, 1).run(zeroed(model, made.plan), name)
    assert torch.equal(Case(4, 1).run(made.model, name), wanted)
    assert not torch.equal(wanted, Case(4, 1).run(model, name)), "pruning changes nothing that can be seen"
    if name == "llama_gqa":
        cache = made.model(**Case(1, 1).inputs(name), use_cache=True)[CACHE]
        width = model.config.hidden_size // model.config.num_attention_heads
        assert {
            tuple(tensor.shape[1::2]) for layer in cache.layers for tensor in (layer.keys, layer.values)
        } == {(1, width)}


# --- plans that are carried out again


SEQUENCES = [
    torch.randint(0, 96, (4, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(6)
]


@pytest.fixture(scope="module")
def captured() -> hf.CapturedModel:
    return hf.capture(ZOO["llama_gqa"].build())


def test_a_plan_is_carried_out_again(captured: hf.CapturedModel) -> None:
    repaired = hf.prune(captured, calibration=SEQUENCES, sparsity=0.3, quality="fast")
    plain = hf.apply(captured, repaired.plan)
    again = hf.apply(captured, repaired.plan, calibration=SEQUENCES)
    assert plain.plan.groups == again.plan.groups == repaired.plan.groups
    ids, dense = SEQUENCES[0], captured.model(SEQUENCES[0]).logits
    cut, best, same = (((one.model(ids).logits - dense).norm()) for one in (plain, repaired, again))
    assert best < cut
    torch.testing.assert_close(same, best, rtol=0.05, atol=0)
    assert torch.equal(plain.model.generate(ids[:1], max_new_tokens=4, do_sample=False)[:, :12], ids[:1])


# --- padding


SEARCH = Search(generations=1, offspring=3, sequences=2)


@pytest.mark.parametrize(
    ("loss", "allocation", "side"),
    [
        ("next-token", SEARCH, "right"),
        pytest.param("outputs", "global", "left", marks=pytest.mark.slow),
        pytest.param("outputs", SEARCH, "left", marks=pytest.mark.slow),
        pytest.param("next-token", "global", "right", marks=pytest.mark.slow),
    ],
    ids=["next-token, search", "outputs", "outputs, search", "next-token"],
)
def test_padding_chooses_nothing(loss: Any, allocation: Any, side: str) -> None:
    """Logits lie at the positions that are asked for, which a program has as an input of its own."""
    model = dense("llama_gqa")
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (4, 10))
    mask = torch.ones_like(ids)
    mask[:, slice(0, 5) if side == "left" else slice(5, None)] = 0
    found = [
        hf.prune(
            model,
            calibration=[{"input_ids": ids.where(mask != 0, filling), "attention_mask": mask}] * 2,
            sparsity=0.25,
            loss=loss,
            allocation=allocation,
            format="fasp-fx",
        )
        for filling in (0, 23)
    ]
    assert (found[0].plan.groups, found[0].report.notes) == (found[1].plan.groups, found[1].report.notes)


# --- distillation of models that generate


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
        result = hf.prune(teacher, sparsity=0.2, score="magnitude", restore=None, format="plain", round_to=1)
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cli")
    make_model(made / "model", layers=1)
    (made / "text.txt").write_text("Größe matters: a smaller model answers sooner. " * 12, encoding="utf-8")
    texts = ["--calibration", made / "text.txt", "--text", made / "text.txt"]
    printed("prune", made / "model", *texts, "--out", made / "pruned", "--round-to", "8", *CHEAP, *SMALL)
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
    shown = printed(*command, "--checkpoint", tmp_path / "run", "--out", tmp_path / "out")
    assert "recovery: distillation" in shown
    assert "perplexity on chunks 6 to 8 of text.txt" in shown
    models = [
        AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True).eval()
        for where in (folder / "pruned", tmp_path / "out", folder / "model")
    ]
    assert type(models[0]).__name__ == type(models[1]).__name__
    ids = {"input_ids": torch.arange(2, 34)[None]}
    assert not torch.equal(models[0](**ids).logits, models[1](**ids).logits)
    printed(*command, "--checkpoint", tmp_path / "run", "--out", tmp_path / "again")
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    assert torch.equal(models[1](**ids).logits, resumed(**ids).logits)
    other = ("--seed", "1", "--checkpoint", tmp_path / "run", "--out", tmp_path / "other")
    assert "another run" in refused(*command, *other)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["again", "out", "run"]


def test_prune_and_recover_in_one_command(folder: Path, tmp_path: Path) -> None:
    asked = ("--recover", "2", "--round-to", "8", "--out", tmp_path / "out")
    assert "recovery: distillation" in printed("prune", folder / "model", *asked, *SMALL)
    report = fasp_fx.load(tmp_path / "out").report
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
    assert said in failed(*command, *options)
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
    assert said in refused(*command, "--data", folder / "text.txt", *SMALL)
