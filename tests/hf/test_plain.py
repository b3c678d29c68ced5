"""Plain checkpoints compute what the masked dense model computes, and load where fasp_fx cannot
be imported.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import PROFILE
from models import VOCABULARY, ZOO, randomise
from oracle import TOLERANCE, error, zeroed
from plain_models import CASES, MORE, dense, gemma3n, mixtral, plain, tokens
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM
from transformers.utils.quantization_config import GgufConfig

import fasp_fx
from fasp_fx.analysis import Group, Member
from fasp_fx.hf import _formats as plain_module, measure, prune
from fasp_fx.hf._fields import Experiments, arrange, find_fields, lowered, units, written

#: those that are read elsewhere in every profile
NAMES = [*CASES, *MORE] if PROFILE == "slow" else ["llama", "gpt2", "opt"]
UNREPAIRED: dict[str, Any] = {"format": "plain", "score": "random", "restore": None}

STRANGER = """
import json, sys
sys.modules["fasp_fx"] = None
import torch
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
tokens = torch.load(folder + "/tokens.pt")
found = {}
for name, options in json.loads(sys.argv[2]).items():
    path = f"{folder}/{name}"
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    with torch.no_grad():
        found[name] = model.eval()(input_ids=tokens, use_cache=False).logits
        if name == "llama":
            found["generated"] = model.generate(tokens, max_new_tokens=4, do_sample=False)
torch.save(found, folder + "/found.pt")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All plain checkpoints, saved."""
    made = tmp_path_factory.mktemp("plain")
    for name in NAMES:
        plain(name).save_pretrained(made / name)
    return made


@pytest.fixture(scope="module")
def elsewhere(folders: Path) -> dict[str, torch.Tensor]:
    """Their logits in a process that cannot import fasp_fx; some are loaded by accelerate."""
    torch.save(tokens(), folders / "tokens.pt")
    options = {name: {"device_map": "cpu"} if name in ("llama", "opt") else {} for name in NAMES}
    command = [sys.executable, "-I", "-c", STRANGER, str(folders), json.dumps(options)]
    subprocess.run(command, check=True, cwd=folders)
    return torch.load(folders / "found.pt")


@pytest.mark.parametrize("name", NAMES)
def test_a_stranger_gets_the_logits_of_the_masked_dense_model(
    name: str, elsewhere: dict[str, torch.Tensor]
) -> None:
    model, pruned = dense(name), plain(name)
    expected = zeroed(model, pruned.plan)(input_ids=tokens(), use_cache=False).logits
    assert error(expected, model(input_ids=tokens(), use_cache=False).logits) > 100 * TOLERANCE
    assert error(pruned.model(input_ids=tokens(), use_cache=False).logits, expected) <= TOLERANCE
    assert error(elsewhere[name], expected) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_the_config_says_it(name: str, folders: Path) -> None:
    case, pruned = {**CASES, **MORE}[name], plain(name)
    stored = json.loads((folders / name / "config.json").read_text(encoding="utf-8"))
    for field, (before, after) in case.fields.items():
        assert getattr(dense(name).config, field, None) == before, f"{field} of the dense model"
        assert (getattr(pruned.model.config, field), stored[field]) == (after, after)
    assert type(pruned.model) is type(dense(name))
    assert abs(pruned.report.sparsity - case.sparsity) < 0.06  # a step of eight neurons
    assert any(f"{field}" in pruned.report.notes[0] for field in case.fields)


def test_tensors_are_named_as_the_class_names_them_in_files(tmp_path: Path) -> None:
    """Those of experts otherwise than in the model."""
    for model, folder in ((dense("mixtral"), "dense"), (plain("mixtral"), "plain")):
        model.save_pretrained(tmp_path / folder)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors").keys() for name in ("plain", "dense"))
    assert ours == theirs != dense("mixtral").state_dict().keys()


def test_experts_and_a_layer_for_all_tokens_stay_multiples_of_what_either_does() -> None:
    """The graph has the layer, which takes any width, before the experts, whose kernel does not."""
    config = hf.HunYuanMoEV1Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        intermediate_size=52,
        head_dim=16,
        num_experts=2,
    )
    pruned = prune(randomise(hf.HunYuanMoEV1ForCausalLM(config)), sparsity=0.4, **UNREPAIRED)
    assert pruned.model.config.intermediate_size % 8 == 0


def test_generation_goes_on(elsewhere: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        expected = plain("llama").model.generate(tokens(), max_new_tokens=4, do_sample=False)
    assert torch.equal(elsewhere["generated"], expected)


def test_what_belongs_to_the_model_stays() -> None:
    model, pruned = dense("opt"), plain("opt")
    assert pruned.model.lm_head.weight is pruned.model.model.decoder.embed_tokens.weight
    assert pruned.model.generation_config.to_dict() == model.generation_config.to_dict()
    assert (pruned.model.dtype, pruned.model.training) == (model.dtype, False)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in pruned.model.state_dict().values()}


def test_groups_that_cannot_be_said_stay_whole_with_the_reason() -> None:
    lines = {line.name: line for line in plain("gpt2").report.lines}
    heads = lines["transformer.h.0.attn.c_proj.weight"]
    assert heads.before == heads.after == 32
    assert (
        heads.reason
        == "left whole: no field of GPT2Config shrinks with it and nothing else, as 'plain' says it"
    )
    assert lines["transformer.h.0.mlp.c_proj.weight"].reason == ""


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"sparsity": 0.9}, r"at most 0\.5833"),
        ("llama", {"sparsity": 0.9, "round_to": 64}, r"at most 0\.3333 with round_to=64"),
        ("llama", {"sparsity": 0.001}, "less than half a step"),
        ("llama", {"sparsity": 1.5}, r"not in \(0, 1\)"),
    ],
)
def test_a_sparsity_out_of_reach_says_what_is_in_reach(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(fasp_fx.SparsityError, match=message):
        prune(dense(name), **UNREPAIRED, **options)


class Branches(LlamaForCausalLM):
    """Cannot be captured."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        return found if found.logits.sum() < 1e9 else None


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "what no field says": (
        lambda: randomise(ZOO["bloom"].make()),
        {},
        fasp_fx.NothingPrunableError,
        "no field of BloomConfig shrinks with it and nothing else",
    ),
    "what cannot be captured, naming no option that nobody gave": (
        lambda: Branches(copy.deepcopy(dense("llama").config)).eval(),
        {"sparsity": 0.2},
        fasp_fx.ExportError,
        "Branches cannot be captured",
    ),
    "sparsity by pattern": (
        lambda: dense("llama"),
        {"sparsity": {"*": 0.2}},
        fasp_fx.ArgumentError,
        "sparsity by pattern cannot be had in the format 'plain'",
    ),
    "a format that nobody knows": (
        lambda: dense("llama"),
        {"format": "pt"},
        fasp_fx.ArgumentError,
        "format='pt' is not known; use 'fasp-fx', 'plain', 'per-layer'",
    ),
    "no model of transformers": (
        lambda: torch.nn.Linear(4, 4),
        {},
        fasp_fx.ArgumentError,
        "models of transformers, not for a Linear",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_plain_checkpoint_cannot_be_is_refused(case: str) -> None:
    make, options, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        prune(make(), **{**UNREPAIRED, **options})


def test_an_encoder_decoder_needs_no_data_either() -> None:
    config = hf.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    model = randomise(hf.T5ForConditionalGeneration(config), seed=3)
    made = prune(model.eval(), **UNREPAIRED, sparsity=0.2)
    given = {"input_ids": tokens(), "decoder_input_ids": tokens().flip(1), "use_cache": False}
    with torch.no_grad():
        found, expected = made.model(**given).logits, zeroed(model, made.plan)(**given).logits
    assert made.model.config.d_ff < 64
    assert error(found, expected) < TOLERANCE


def test_a_wrong_model_is_never_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are swapped on the way to the smaller model; shapes do not tell."""
    original = plain_module.smaller_weights

    def swapped(*args: Any) -> dict[str, torch.Tensor]:
        found = original(*args)
        name = "transformer.h.0.mlp.c_proj.weight"
        return {**found, name: found[name].flip(0)}

    monkeypatch.setattr(plain_module, "smaller_weights", swapped)
    with pytest.raises(fasp_fx.VerificationError, match=r"its outputs differ by .*nothing is returned"):
        prune(dense("gpt2"), **UNREPAIRED, sparsity=0.1, round_to=16)


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3n", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning")
def test_fields_of_a_config_are_turned_by_predicted_losses(name: str) -> None:
    model = dense(name)
    batches = [tokens(batch, 12) for batch in range(2, 8)]
    pruned = prune(model, format="plain", calibration=batches, sparsity=0.15)
    before, after = model.config.intermediate_size, pruned.model.config.intermediate_size
    assert after < before if name == "llama" else len(set(after)) > 1
    costs = measure(model, calibration=batches)
    again = prune(model, format="plain", calibration=batches, sparsity=0.15, costs=costs)
    assert again.model.config.intermediate_size == after


def test_what_was_frozen_or_came_of_a_quantised_file_is_saved_as_what_it_is(tmp_path: Path) -> None:
    model = copy.deepcopy(dense("opt"))
    model.config.quantization_config = GgufConfig()
    model.model.decoder.embed_tokens.weight.requires_grad_(False)
    found = prune(model, sparsity=0.2, **UNREPAIRED)
    frozen = [name for name, own in found.model.named_parameters() if not own.requires_grad]
    assert frozen == ["model.decoder.embed_tokens.weight"]
    found.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert isinstance(model.config.quantization_config, GgufConfig)


# --- which fields shrink which groups


def _meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


def _member(model: nn.Module, name: str, dim: int, blocks: int = 1) -> Member:
    size = model.get_parameter(name).shape[dim] * blocks
    return Member(name, dim, tuple(range(size)), size, 0 if blocks > 1 else None, blocks)


def _group(
    model: nn.Module,
    size: int,
    producers: list[str],
    consumer: tuple[str, int],
    rows: int = 0,
    blocks: int = 1,
) -> Group:
    producing = tuple(
        _member(model, name, rows if model.get_parameter(name).dim() > 1 else 0, blocks) for name in producers
    )
    consuming = (_member(model, *consumer, blocks),)
    return Group(
        consumer[0],
        size,
        blocks,
        "prunable",
        "",
        producing,
        consuming,
        np.arange(size),
        np.repeat(np.arange(blocks), size // blocks),
        "channel",
    )


def _feed(
    model: nn.Module,
    layer: int,
) -> Group:
    stem = f"model.layers.{layer}.mlp"
    rows = [f"{stem}.gate_proj.weight", f"{stem}.up_proj.weight"]
    return _group(model, model.get_parameter(rows[0]).shape[0], rows, (f"{stem}.down_proj.weight", 1))


def _found(model: Any, groups: list[Group]) -> list[tuple[str, set[str]]]:
    """What each field says when it is turned by one step, and what it shrinks."""
    experiments = Experiments(type(model), model.config)
    fields = find_fields(experiments, (place for group in groups for place in units(group)))
    places = arrange(groups, fields, ("",))
    found = []
    for place in sorted({place for place in places if place is not None}):
        shrunk = [group for group, own in zip(groups, places, strict=True) if own == place]
        lost = {at: by for group in shrunk for at, by in units(group).items()}
        ((path, steps),) = lowered(lost, fields)[0].items()
        value = next(field.value for field in fields if field.path == path)
        found.append((f"{written(path)}={value - steps}", {group.name for group in shrunk}))
    return found


def test_lists_are_fields_by_layer() -> None:
    model = _meta(gemma3n)
    groups = [_feed(model, layer) for layer in range(2)]
    assert _found(model, groups) == [
        ("intermediate_size[0]=47", {groups[0].name}),
        ("intermediate_size[1]=63", {groups[1].name}),
    ]


def test_stacked_experts_shrink_together() -> None:
    model = _meta(mixtral)
    stem = "model.layers.{}.mlp.experts"
    groups = [
        _group(
            model,
            96,
            [f"{stem.format(layer)}.gate_up_proj"],
            (f"{stem.format(layer)}.down_proj", 2),
            rows=1,
            blocks=2,
        )
        for layer in range(2)
    ]
    assert _found(model, groups) == [("intermediate_size=47", {groups[0].name, groups[1].name})]
