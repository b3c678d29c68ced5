"""Pruned models on disk, and what transformers makes of them."""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from generators import Case, pruned
from models import make_model
from safetensors.torch import load_file, save_file
from saved import GOLDEN
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

import fasp_fx
from fasp_fx import PruningPlan, Report, hf
from fasp_fx.base import CACHE
from fasp_fx.hf import Pruned
from fasp_fx.hf._folder import FILES
from fasp_fx.hf._formats import build
from fasp_fx.hf._registry import format_of
from fasp_fx.pruning import CARD, Line, read_told
from fasp_fx.storage import MANIFEST, is_save, read_json, read_manifest, write_json, write_manifest

CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{% if"
    " add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> hf.Pruned:
    """A pruned Llama with a byte-level tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("bytes")
    make_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    return dataclasses.replace(pruned("llama_gqa"), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def folder(bytes_model: hf.Pruned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bytes_model.save_pretrained(tmp_path_factory.mktemp("saved") / "out")


@torch.no_grad()
def _logits(model: Any) -> Any:
    return model(input_ids=torch.arange(40, 60)[None]).logits


def test_loaded_model_is_the_saved_one(bytes_model: hf.Pruned, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is hf.PrunedForCausalLM
    assert torch.equal(_logits(loaded), _logits(bytes_model.model))
    assert (loaded.plan, loaded.report) == (bytes_model.plan, bytes_model.report)
    assert loaded.state_dict().keys() == bytes_model.model.state_dict().keys()
    assert not loaded.training
    assert loaded.generation_config.to_diff_dict() == bytes_model.model.generation_config.to_diff_dict()
    ids = torch.arange(40, 50)[None]
    assert torch.equal(
        loaded.generate(ids, max_new_tokens=8, do_sample=False),
        bytes_model.model.generate(ids, max_new_tokens=8, do_sample=False),
    )


def test_folder_is_one_of_transformers(folder: Path) -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "plan.json"}
    assert names <= {file.name for file in folder.iterdir()}
    assert isinstance(AutoConfig.from_pretrained(folder), hf.PrunedConfig)


def test_weights_are_stored_once(tmp_path: Path) -> None:
    result = pruned("gpt2")
    result.save_pretrained(tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names  # tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(Case(1, 1).run(loaded, "gpt2"), Case(1, 1).run(result.model, "gpt2"))


@pytest.mark.slow
def test_in_a_new_process() -> None:
    folder = str(GOLDEN / "hf")
    code = (
        "import fasp_fx, sys; assert 'transformers' not in sys.modules\n"
        "import fasp_fx.hf; from transformers import AutoModelForCausalLM\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({folder!r})).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "PrunedForCausalLM"


def test_pipeline_and_chat_template(bytes_model: hf.Pruned, folder: Path) -> None:
    made = pipeline("text-generation", model=str(folder))
    chat = [{"role": "user", "content": "hello"}]
    answer = made(chat, max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert answer[-1]["role"] == "assistant"
    ids = bytes_model.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    found = bytes_model.model.generate(ids, max_new_tokens=6, do_sample=False)
    assert answer[-1]["content"] == bytes_model.tokenizer.decode(
        found[0, ids.shape[1] :], skip_special_tokens=True
    )
    assert len(made(["a", "a longer text"], batch_size=1, max_new_tokens=3, do_sample=False)) == 2


def test_lm_eval_scores_it(bytes_model: hf.Pruned) -> None:
    """As docs/evaluation.md says; held against the log-likelihood computed by hand."""
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = bytes_model.model, bytes_model.tokenizer
    request = instance("loglikelihood", {}, ("Ice is", " cold"), 0)
    scorer = HFLM(model, tokenizer=tokenizer, batch_size=2)
    ((found, _),) = scorer.loglikelihood([request], disable_tqdm=True)
    ids = torch.tensor(tokenizer("Ice is cold")["input_ids"])
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])
    assert found == pytest.approx(float(expected[-5:].sum()), rel=1e-4)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "hf", tmp_path / "copy"))


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found(copied: Path, name: str) -> None:
    (copied / name).write_bytes((copied / name).read_bytes()[:-1])
    for _ in ("cut", "gone"):
        with pytest.raises(fasp_fx.StoreError, match=name.replace(".", r"\.")):
            hf.PrunedForCausalLM.from_pretrained(copied)
        (copied / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": torch.float16}, "float16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "the device"),
        ({"device_map": "sequential"}, "the device"),
        ({"attn_implementation": "eager"}, "attn_implementation"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused(folder: Path, options: dict[str, Any], says: str) -> None:
    for kind in (hf.PrunedForCausalLM, AutoModelForCausalLM):
        with pytest.raises(fasp_fx.ArgumentError, match=says):
            kind.from_pretrained(folder, **options)


def test_a_changed_configuration_is_the_models(folder: Path) -> None:
    tokens = torch.arange(3, 9)[None]
    model = AutoModelForCausalLM.from_pretrained(folder, use_cache=False, pad_token_id=7, dtype="auto")
    again = AutoModelForCausalLM.from_pretrained(folder, config=model.config, device_map="cpu")
    for made in (model, again):
        assert (made.config.use_cache, made.config.pad_token_id) == (False, 7)
        assert (made.dtype, made(tokens).get(CACHE)) == (torch.float64, None)
    asked = AutoModelForCausalLM.from_pretrained(folder, output_hidden_states=True, dtype=torch.float64)
    with pytest.raises(fasp_fx.ArgumentError, match="hidden_states"):
        asked(tokens)


def test_the_wrong_auto_class_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(fasp_fx.StoreError, match="AutoModelForCausalLM"):
        AutoModelForSeq2SeqLM.from_pretrained(folder)
    with pytest.raises(fasp_fx.StoreError, match="is not a folder"):
        hf.PrunedForCausalLM.from_pretrained(tmp_path / "nowhere")


# --- the folder of a plain checkpoint


PLAN = PruningPlan("0" * 64, (), 0.25)
LINE = Line("a.weight", "prunable", 8, 6, 1, "")
REPORT = Report(0.25, 0.25, (100, 80), (400, 320), (LINE,), notes=("the config says it with ffn_dim 8 -> 6",))


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "plain")


class Tokenizer:
    """Writes one file."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "vocab.txt").write_text("a b c", encoding="utf-8")


def test_the_folder_holds_all_of_it(model: Any, tmp_path: Path) -> None:
    folder = Pruned(model, PLAN, REPORT, Tokenizer(), "plain").save_pretrained(tmp_path / "out")
    theirs = {"config.json", "generation_config.json", "model.safetensors", "vocab.txt"}
    ours = {"plan.json", "report.json", "manifest.json", "README.md"}
    assert ({file.name for file in folder.iterdir()}, read_told(folder)) == (theirs | ours, (PLAN, REPORT))
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    assert is_save(folder, "plain")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(list(again.parameters()), list(model.parameters()), rtol=0, atol=0)


def test_what_was_trained_since_is_saved_anew(model: Any, tmp_path: Path) -> None:
    """What lies beside a manifest that says otherwise may be damaged, so it is not taken for trained."""
    folder = Path(shutil.copytree(GOLDEN / "plain", tmp_path / "out"))
    found = fasp_fx.load(folder)
    found.model.lm_head.weight.detach().fill_(0.5)
    found.model.save_pretrained(folder)
    with pytest.raises(fasp_fx.StoreError, match=r"config.json has|model.safetensors was changed"):
        fasp_fx.load(folder)
    assert (fasp_fx.load(found.save_pretrained(tmp_path / "again")).model.lm_head.weight == 0.5).all()
    (folder / "manifest.json").unlink()  # then it is a folder of transformers
    assert (transformers.AutoModelForCausalLM.from_pretrained(folder).lm_head.weight == 0.5).all()


def narrower(format: str) -> Pruned:
    """A Llama whose first feed-forward layer is narrower than the second, in a format."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 512, "num_attention_heads": 2, "num_hidden_layers": 2}
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=32, head_dim=32))
    weights = dense.state_dict()
    for part, dim in (("gate", 0), ("up", 0), ("down", 1)):
        name = f"model.layers.0.mlp.{part}_proj.weight"
        weights[name] = weights[name].narrow(dim, 0, 256).contiguous()
    made, _ = build(format, format_of(format).experiments(type(dense), dense.config), weights, dense)
    return Pruned(made, PLAN, REPORT, None, format)


@pytest.fixture(scope="module", params=["fasp-fx", "plain", "per-layer", "decilm", "gguf-q8_0"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in a format; tests must not change it."""
    golden = {"fasp-fx": "hf", "plain": "plain"}
    if request.param in golden:
        return GOLDEN / golden[request.param]
    return narrower(request.param).save_pretrained(tmp_path_factory.mktemp("saved") / request.param)


def weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", {"format": "pt"})

    return write


def fields(name: str, **values: Any) -> Callable[[Path], object]:
    return lambda folder: write_json(folder / name, read_json(folder / name) | values)


def flipped(name: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)

    return write


def last(held: dict[str, Tensor], part: str) -> str:
    return next(name for name in reversed(held) if part in name)


DAMAGES: dict[str, Callable[[Path], object]] = {
    **{
        f"without {part}": weights(lambda held, part=part: held.pop(last(held, part)))
        for part in ("down_proj", "embed", "norm", "proj.weight")
    },
    "weights exchanged": weights(
        lambda held: held.update({last(held, "gate"): held[last(held, "up")].clone()})
    ),
    "weights scaled": weights(lambda held: held[last(held, "norm")].mul_(2)),
    "one more weight": weights(lambda held: held.update(more=torch.ones(1))),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    **{f"a bit of {name}": flipped(name) for name in ("model.safetensors", "plan.json", "report.json")},
    **{
        f"{name}={value}": fields("config.json", **{name: value})
        for name, value in {
            **{"num_hidden_layers": 3, "hidden_act": "gelu", "rms_norm_eps": 0.1, "original": {}},
            **{"num_layers": 9_000_000_000, "architectures": ["MistralForCausalLM"], "dtype": "float16"},
        }.items()
    },
    "no config": lambda folder: (folder / "config.json").unlink(),
    "another end": fields("generation_config.json", eos_token_id=3),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "another kind": fields(MANIFEST, kind="whole"),
    "no list of files": lambda folder: write_json(
        folder / MANIFEST, {"format": "fasp_fx/1", "kind": "plain"}
    ),
    "a list of no files": fields(MANIFEST, files=["config.json"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_changed_is_not_loaded(saved: Path, damage: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "out"))
    DAMAGES[damage](folder)
    with pytest.raises(fasp_fx.StoreError):
        fasp_fx.load(folder)


@pytest.mark.parametrize("damage", ["without down_proj", "one more weight", "num_hidden_layers=3"])
def test_no_weight_is_made_up_even_where_sums_fit(saved: Path, damage: str, tmp_path: Path) -> None:
    folder, kind = Path(shutil.copytree(saved, tmp_path / "out")), read_manifest(saved).kind
    DAMAGES[damage](folder)
    write_manifest(folder, kind)
    if kind == "hf":
        return  # its programs say what they need
    with pytest.raises(fasp_fx.StoreError, match=r"does not hold what config\.json says"):
        fasp_fx.load(folder)


# --- the card


class Hub:
    """A hub that keeps what is put there."""

    files: ClassVar[dict[str, str]] = {}

    def __init__(self, token: str | None = None) -> None: ...

    def create_repo(self, name: str, **options: Any) -> Any:
        return type("Repository", (), {"repo_id": name})

    def file_exists(self, repo: str, name: str) -> bool:
        return name in self.files

    def hf_hub_download(self, repo: str, name: str) -> str:
        return self.files[name]

    def upload_folder(self, *, folder_path: Path, ignore_patterns: list[str] | None, **options: Any) -> str:
        left = {file.name: file for file in folder_path.iterdir() if file.name not in (ignore_patterns or ())}
        self.files |= {name: file.read_text("utf-8", "replace") for name, file in left.items()}
        return "address"


def test_a_card_goes_along_and_leaves_that_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = pruned("llama_gqa")
    monkeypatch.setattr(given.model, "name_or_path", "someone/llama")
    monkeypatch.setattr(given.model, "report", given.report)
    folder = given.save_pretrained(tmp_path / "out")
    card = (folder / CARD).read_text()
    for words in ("base_model: someone/llama", "library_name: transformers", "* *measured*: ", '"sparsity"'):
        assert words in card
    assert 'AutoModelForCausalLM.from_pretrained("this/repository")' in card
    given.with_report(sparsity=0.5).save_pretrained(folder, overwrite=True)
    assert "50.0% of it removed" in (folder / CARD).read_text()
    (folder / CARD).write_text("mine")
    given.save_pretrained(folder, overwrite=True)
    assert (folder / CARD).read_text() == "mine"
    assert isinstance(fasp_fx.load(folder), hf.Pruned)
    monkeypatch.setattr("fasp_fx.hf._folder.HfApi", Hub)
    assert given.push_to_hub("me/small", private=True) == "address"
    assert {"model.safetensors", "manifest.json"} <= Hub.files.keys()
    assert Hub.files[CARD] == card
    (tmp_path / "theirs").write_text("theirs")
    Hub.files[CARD] = str(tmp_path / "theirs")
    given.push_to_hub("me/small")
    assert Hub.files[CARD] == str(tmp_path / "theirs")
