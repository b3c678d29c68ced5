"""The folder of a plain checkpoint: whole or not at all, with what belongs to it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from saved import GOLDEN
from torch import Tensor

import fasp_fx
from fasp_fx import PruningPlan, Report
from fasp_fx.hf import Pruned
from fasp_fx.hf._formats import build
from fasp_fx.hf._registry import format_of
from fasp_fx.pruning import Line, read_told
from fasp_fx.storage import MANIFEST, is_save, kind_of, read_json, write_json, write_manifest

PLAN = PruningPlan("0" * 64, (), 0.25)
LINE = Line("a.weight", "prunable", 8, 6, 1, "")
REPORT = Report(0.25, 0.25, (100, 80), (400, 320), (LINE,), notes=("the config says it with ffn_dim 8 -> 6",))


@pytest.fixture(scope="module")
def model() -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(GOLDEN / "plain")


class Tokenizer:
    """Writes one file."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "vocab.txt").write_text("a b c", encoding="utf-8")


def test_the_folder_holds_all_of_it(model: Any, tmp_path: Path) -> None:
    folder = Pruned(model, PLAN, REPORT, Tokenizer(), "plain").save_pretrained(tmp_path / "out")
    theirs = {"config.json", "generation_config.json", "model.safetensors", "vocab.txt"}
    ours = {"plan.json", "report.json", "manifest.json"}
    assert {file.name for file in folder.iterdir()} == theirs | ours
    assert read_told(folder) == (PLAN, REPORT)
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    assert is_save(folder, "plain")
    again = hf.AutoModelForCausalLM.from_pretrained(folder)
    for own, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(own, other)


def test_what_was_trained_since_is_saved_anew(model: Any, tmp_path: Path) -> None:
    """What lies beside a manifest that says otherwise may be damaged, so it is not taken for trained."""
    folder = Path(shutil.copytree(GOLDEN / "plain", tmp_path / "out"))
    found = fasp_fx.load(folder)
    with torch.no_grad():
        found.model.lm_head.weight.fill_(0.5)
    found.model.save_pretrained(folder)
    with pytest.raises(fasp_fx.StoreError, match=r"config.json has|model.safetensors was changed"):
        fasp_fx.load(folder)
    again = fasp_fx.load(found.save_pretrained(tmp_path / "again")).model
    assert (again.lm_head.weight == 0.5).all()
    (folder / "manifest.json").unlink()  # then it is a folder of transformers
    assert (hf.AutoModelForCausalLM.from_pretrained(folder).lm_head.weight == 0.5).all()


def narrower(format: str) -> Pruned:
    """A Llama whose first feed-forward layer is narrower than the second, in a format."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 512, "num_attention_heads": 2, "num_hidden_layers": 2}
    dense = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=32, head_dim=32))
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
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_changed_is_not_loaded(saved: Path, damage: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "out"))
    DAMAGES[damage](folder)
    with pytest.raises(fasp_fx.StoreError):
        fasp_fx.load(folder)


@pytest.mark.parametrize("damage", ["without down_proj", "one more weight", "num_hidden_layers=3"])
def test_no_weight_is_made_up_even_where_sums_fit(saved: Path, damage: str, tmp_path: Path) -> None:
    folder, kind = Path(shutil.copytree(saved, tmp_path / "out")), kind_of(saved)
    DAMAGES[damage](folder)
    write_manifest(folder, kind)
    if kind == "hf":
        return  # its programs say what they need
    with pytest.raises(fasp_fx.StoreError, match=r"does not hold what config\.json says"):
        fasp_fx.load(folder)
