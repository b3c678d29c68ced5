"""Saving and loading: the same module, plan and report back."""

import inspect
import json
import pickle
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from models import X, block, wide
from safetensors.torch import load_file
from saved import GOLDEN, MAKERS, Mode, Small, forge, forked, outputs, small_result
from torch import Tensor, nn

import fasp_fx
from fasp_fx.pruning import _result as folders
from fasp_fx.storage import MANIFEST, _folder as storage
from fasp_fx.storage._folder import FORMAT

pytestmark = [pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning")]


def test_outputs_plan_and_report_are_those_that_were_saved(result: fasp_fx.Result, saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    versions = (manifest["format"], manifest["torch"], manifest["fasp_fx"])
    assert versions == (FORMAT, torch.__version__, fasp_fx.__version__)
    assert {file.name for file in saved.iterdir()} == {*folders.FILES, MANIFEST, "README.md"}
    assert len({file.stat().st_mode for file in saved.iterdir()}) == 1
    loaded = fasp_fx.load(saved)
    assert (loaded.plan, loaded.report) == (result.plan, result.report)
    for file in saved.iterdir():
        file.write_bytes(b"")  # the files are not needed after loading
    for shape in ((2, 5), (3, 9), (7, 2)):
        ids = torch.randint(0, 11, shape)
        first, second = result.module(ids), loaded.module(ids)
        assert torch.equal(first["logits"], second["logits"])
        assert torch.equal(first["extra"][0], second["extra"][0])
        assert first["extra"][1] == second["extra"][1] == 3


def test_weights_keep_names_dtype_grad_ties_and_layout(result: fasp_fx.Result, saved: Path) -> None:
    loaded = fasp_fx.load(saved)
    before, after = (
        dict(result.module.named_parameters(remove_duplicate=False)),
        dict(loaded.module.named_parameters(remove_duplicate=False)),
    )
    first, second = (
        {name: (weight.dtype, weight.requires_grad, weight.stride()) for name, weight in each.items()}
        for each in (before, after)
    )
    assert first == second
    assert after["turned"].stride() == (1, 8)
    assert not after["down.bias"].requires_grad
    assert after["embed.weight"] is after["head.weight"]
    assert (
        loaded.program.state_dict["embed.weight"]
        is loaded.program.state_dict["head.weight"]
        is after["embed.weight"]
    )
    assert (
        loaded.module.state_dict().keys() == result.module.state_dict().keys() == Small().state_dict().keys()
    )
    assert (saved / "weights.safetensors").stat().st_size < sum(
        p.nbytes for p in result.module.parameters()
    ) + 32 + 2048


def test_signature_is_the_callers(result: fasp_fx.Result, saved: Path) -> None:
    loaded = fasp_fx.load(saved)
    ids = torch.randint(0, 11, (2, 5))
    before, after = inspect.signature(result.module.forward), inspect.signature(loaded.module.forward)
    assert [(p.name, p.kind) for p in before.parameters.values()] == [
        (p.name, p.kind) for p in after.parameters.values()
    ]
    assert after.parameters["sizes"].default == (1, 2)
    loaded.module(ids=ids, scale=2.0, flag=True, sizes=(1, 2))
    for wrong in ({"scale": 3.0}, {"flag": False}, {"sizes": [1, 2]}, {"mode": Mode.OTHER}):
        with pytest.raises(fasp_fx.CallError, match=next(iter(wrong))):
            loaded.module(ids, **wrong)


def test_a_loaded_result_trains_exports_and_prunes(saved: Path) -> None:
    loaded = fasp_fx.load(saved)
    ids = torch.randint(0, 11, (3, 6))
    loaded.module(ids)["logits"].sum().backward()
    assert loaded.module.get_parameter("up.weight").grad is not None
    exported = torch.export.export(loaded.module, (ids,), strict=False)
    assert torch.equal(exported.module()(ids)["logits"], loaded.module(ids)["logits"])
    smaller = fasp_fx.prune(
        loaded.module, (ids,), calibration=[(torch.randint(0, 11, (4, 16)),)], sparsity=0.3
    )
    assert smaller.report.parameters[1] < loaded.report.parameters[1]
    assert fasp_fx.prune(
        loaded.program, calibration=[(torch.randint(0, 11, (4, 16)),)], sparsity=0.3
    ).plan.groups


def _quantised(program: torch.export.ExportedProgram, x: Tensor) -> list[int]:
    """How many tensors each quantiser of torchao finds to quantise."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

    found = []
    for quantiser, config in (
        (x86.X86InductorQuantizer(), x86.get_default_x86_inductor_quantization_config()),
        (xnnpack.XNNPACKQuantizer(), xnnpack.get_symmetric_quantization_config()),
    ):
        prepared = pt2e.prepare_pt2e(program.module(check_guards=False), quantiser.set_global(config))
        prepared(x)
        nodes = pt2e.convert_pt2e(prepared).graph.nodes
        found.append(sum("quantize_per" in str(node.target) for node in nodes))
    return found


def test_what_is_made_of_a_program_can_be_made_of_one_that_was_loaded(tmp_path: Path) -> None:
    """Where nodes come from is saved: quantisers pass over, and torch cannot unflatten, what does not say."""
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.AdaptiveAvgPool2d(1))
    model, x = nn.Sequential(convolutions, nn.Flatten(), nn.Linear(12, 4)).eval(), torch.randn(2, 3, 8, 8)
    result = fasp_fx.prune(model, (x,), score="magnitude", restore=None, sparsity=0.3)
    programs = {
        "fresh": result.program,
        "loaded": fasp_fx.load(result.save(tmp_path / "out")).program,
        "applied": fasp_fx.apply(model, result.plan, (x,)).program,
        "eager": torch.export.export(result.eager(model), (x,)),
    }
    dense = _quantised(torch.export.export(model, (x,)), x)
    assert min(dense) > 5
    with torch.no_grad():
        expected = result.module(x)
        for name, program in programs.items():
            assert _quantised(program, x) == dense, name
            torch.testing.assert_close(torch.export.unflatten(program)(x), expected)


@pytest.mark.parametrize("name", ["user,item", "a;b", "a/b = c", "(", "x" * 900])
def test_odd_names_are_saved_with_where_nodes_come_from(name: str, tmp_path: Path) -> None:
    parts = nn.ModuleDict({name: nn.Linear(6, 6)})
    model = wide(lambda self, x: self.parts[name](block(self, x)), parts=parts)
    result = fasp_fx.prune(model, (X,), score="random", restore=None, sparsity=0.3)
    loaded = fasp_fx.load(result.save(tmp_path / "out"))
    assert torch.equal(loaded.module(X), result.module(X))
    assert torch.equal(pickle.loads(pickle.dumps(result.module))(X), result.module(X))
    stacks = [node.meta.get("nn_module_stack") for node in loaded.program.graph.nodes]
    assert any(name in str(stack) for stack in stacks)


def test_weights_of_a_copy_that_was_trained_are_not_forgotten(tmp_path: Path) -> None:
    model = wide(lambda self, x: self.norm(block(self, x)), norm=nn.BatchNorm1d(6))
    result = fasp_fx.prune(model, (X,), score="random", restore=None, sparsity=0.3)
    copy = result.eager(model)
    result.save(tmp_path / "before")
    copy.get_parameter("down.bias").detach().add_(1.0)
    with pytest.raises(fasp_fx.StoreError, match=r"'down\.bias'.*load_state_dict"):
        result.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result.module.load_state_dict(copy.state_dict(), strict=False)
    assert torch.equal(fasp_fx.load(result.save(tmp_path / "out")).module(X), copy(X))
    result.module.get_parameter("down.bias").detach().add_(1.0)  # what the module learns is its own
    copy = result.eager(model)
    result.module.get_parameter("down.bias").detach().add_(1.0)
    del copy
    result.save(tmp_path / "after")


def test_nothing_is_pickled(result: fasp_fx.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        for owner in (pickle, torch, torch.export):
            for name in ("dump", "dumps", "save", "load", "loads", "Pickler", "Unpickler"):
                patched.setattr(owner, name, None, raising=False)
        loaded = fasp_fx.load(result.save(tmp_path / "out"))
    assert loaded.plan == result.plan


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_named_with_the_remedy(saved: Path) -> None:
    def to_cuda(data: dict[str, Any]) -> None:
        data["program"] = json.loads(json.dumps(data["program"]).replace('"cpu"', '"cuda:0"'))

    forge(saved, "graph.json", to_cuda)
    for name in ("weights", "constants"):
        forge(
            saved,
            f"{name}.safetensors",
            lambda entries: [entry.update(device="cuda:0") for entry in entries.values()],
        )
    with pytest.raises(fasp_fx.StoreError, match=r"device 'cuda:0'.*pass device='cpu'"):
        fasp_fx.load(saved)
    with pytest.raises(fasp_fx.ArgumentError, match=r"^the device 'cuda:1' cannot be used here"):
        fasp_fx.load(saved, device="cuda:1")  # which is the caller's wish, and none of the save
    loaded = fasp_fx.load(saved, device="cpu")
    assert loaded.module(torch.randint(0, 11, (2, 5)))["logits"].device.type == "cpu"


def _pruned(forward: Any, given: Any = X) -> fasp_fx.Result:
    return fasp_fx.prune(wide(forward), (given,), sparsity=0.3, score="random", restore=None)


def _halved() -> fasp_fx.Result:
    """Of weights that were changed away from the graph."""
    result = small_result()
    result.module.half()
    return result


KEY = ("a", "b")
#: results that could not be read again, and what is said of them
UNREADABLE: dict[str, tuple[Callable[[], fasp_fx.Result], str]] = {
    "constant": (lambda: small_result(mode=Mode.OTHER), r"argument 'mode'.*Mode.OTHER.*plain data"),
    "dtype": (_halved, r"has dtype torch.float16.*captured with torch.float32"),
    "text": (lambda: _pruned(lambda self, x: {"made": block(self, x), "task": "classify"}), "classify"),
    "keys": (lambda: _pruned(lambda self, x: {KEY: block(self, x)}), "key"),
    "taken": (lambda: _pruned(lambda self, x: block(self, x[KEY]), {KEY: X}), "key"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_could_not_be_read_again_is_not_written(name: str, tmp_path: Path) -> None:
    make, says = UNREADABLE[name]
    with pytest.raises(fasp_fx.StoreError, match=says):
        make().save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


class Marked(nn.Parameter):
    """No plain tensor."""


def _assigned(module: nn.Module) -> None:
    module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()}, assign=True)


def _parameter(module: nn.Module, kind: Any = nn.Parameter) -> None:
    first = module.get_submodule("0")
    first.weight = kind(first.get_parameter("weight").detach() * 2)


def _buffer(module: nn.Module) -> None:
    norm = module.get_submodule("1")
    norm.running_mean = norm.get_buffer("running_mean") + 1


def _normed() -> tuple[fasp_fx.Result, Tensor]:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(5, 6)
    return fasp_fx.prune(nn.Sequential(*layers).eval(), (x,), score="magnitude", restore=None), x


@pytest.mark.parametrize("change", [_assigned, _parameter, _buffer])
def test_tensors_put_in_the_place_of_others_are_stored(change: Any, tmp_path: Path) -> None:
    result, x = _normed()
    before = result.module(x)
    change(result.module)
    expected = result.module(x)
    assert not torch.allclose(expected, before)
    assert torch.equal(fasp_fx.load(result.save(tmp_path / "out")).module(x), expected)
    assert torch.equal(result.program.module()(x), expected)


def test_the_program_follows_its_module_to_another_dtype() -> None:
    result, x = _normed()
    assert torch.equal(result.module.double()(x.double()), result.program.module()(x.double()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda module: _parameter(module, Marked), "'0.weight' is a Marked now"),
        (
            lambda module: torch.nn.utils.parametrizations.weight_norm(module.get_submodule("0")),
            "'0.weight' is no parameter any more",
        ),
        (lambda module: delattr(module.get_submodule("0"), "weight"), "has no '0.weight' any more"),
    ],
    ids=["no plain tensor", "computed", "gone"],
)
def test_what_is_put_in_the_place_of_tensors_is_refused(change: Any, says: str, tmp_path: Path) -> None:
    result, _ = _normed()
    change(result.module)
    for ask in (
        lambda: result.save(tmp_path / "out"),
        lambda: pickle.dumps(result.module),
        lambda: result.program,
    ):
        with pytest.raises(fasp_fx.StoreError, match=says):
            ask()
    assert not list(tmp_path.iterdir())


Pair = namedtuple("Pair", ["left", "right"])


def test_an_output_type_must_be_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import _pytree as pytree

    x = torch.randn(3, 4)
    model = wide(lambda self, x: Pair(y := block(self, x), y + 1), size=4)
    result = fasp_fx.prune(model, (x,), calibration=[x], sparsity=0.3)
    with pytest.raises(fasp_fx.StoreError, match="regist"):
        result.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    pytree._register_namedtuple(Pair, serialized_type_name="test_store.Pair")
    loaded = fasp_fx.load(result.save(tmp_path / "out"))
    assert isinstance(loaded.module(x), Pair)
    assert torch.equal(loaded.module(x).right, result.module(x).right)
    monkeypatch.delitem(pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE, "test_store.Pair")
    with pytest.raises(
        fasp_fx.StoreError, match=r"test_store.Pair, a type that is not registered here; import"
    ):
        fasp_fx.load(tmp_path / "out")


# --- golden saves, which tests/saved.py wrote once


@pytest.mark.parametrize("kind", MAKERS)
def test_golden_saves_are_read(kind: str) -> None:
    expected = load_file(GOLDEN / "outputs.safetensors")[kind]
    torch.testing.assert_close(outputs(GOLDEN / kind), expected, rtol=1e-4, atol=1e-5)


def test_golden_documents_are_read() -> None:
    texts = {
        name: (GOLDEN / name).read_text()
        for name in ("costs.json", "config.json", "hf/plan.json", "hf/report.json")
    }
    costs, config = (
        fasp_fx.Costs.from_json(texts["costs.json"]),
        fasp_fx.PruningConfig.from_json(texts["config.json"]),
    )
    assert [(name, len(curve.losses)) for name, curve in costs.items()] == [("2.weight", 12)]
    assert config == fasp_fx.PruningConfig(
        budget=fasp_fx.allocation.Parameters(0.8), exclude=("lm_head",), drift=0.3, round_to=1
    )
    plan, report = (
        fasp_fx.PruningPlan.from_json(texts["hf/plan.json"]),
        fasp_fx.Report.from_json(texts["hf/report.json"]),
    )
    assert [group.removed_sets for group in plan.groups] == [
        line.before - line.after for line in report.lines if line.before != line.after
    ]
    assert report.parameters == (3376, 2704)


# --- whole or not there


def files(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_save_leaves_nothing_behind(
    result: fasp_fx.Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    existing: bool,
) -> None:
    target = tmp_path / "out"
    if existing:
        result.save(target)
    before = files(tmp_path)

    for module, place in ((folders, "write_tensors"), (storage, "_sha256")):
        with monkeypatch.context() as patched:
            patched.setattr(module, place, Mock(side_effect=error("interrupted")))
            with pytest.raises(error):
                result.save(target, overwrite=existing)
        assert files(tmp_path) == before
        assert len(list(tmp_path.rglob("*"))) == (1 + len(before) if existing else 0)


def test_a_failed_swap_keeps_the_earlier_save(
    result: fasp_fx.Result, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def only_aside(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", only_aside)
    with pytest.raises(fasp_fx.StoreError, match="no space"):
        result.save(saved, overwrite=True)
    fasp_fx.load(saved)
    assert list(saved.parent.iterdir()) == [saved]


#: what stands where a result shall be saved, beside a save
TAKEN: dict[str, Callable[[Path, Path], object]] = {
    "file": lambda mine, saved: mine.write_text("mine"),
    "empty": lambda mine, saved: mine.mkdir(),
    "folder": lambda mine, saved: (mine / "deep").mkdir(parents=True),
    "link": lambda mine, saved: mine.symlink_to(saved),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_overwrite_never_replaces_anything_else(result: fasp_fx.Result, saved: Path, kind: str) -> None:
    TAKEN[kind](saved.parent / "mine", saved)
    before = sorted(saved.parent.rglob("*"))
    with pytest.raises(fasp_fx.StoreError, match="not a folder that save"):
        result.save(saved.parent / "mine", overwrite=True)
    assert sorted(saved.parent.rglob("*")) == before


def kept(kind: str) -> Any:
    """A result of a kind, read."""
    return fasp_fx.load(GOLDEN / kind, model=forked() if kind == "parts" else None)


@pytest.mark.parametrize("kind", MAKERS)
def test_results_of_every_kind_replace_only_saves(kind: str, tmp_path: Path) -> None:
    held = kept(kind)
    save = held.save_pretrained if isinstance(held, fasp_fx.hf.Pruned) else held.save
    out = save(tmp_path / "out")
    with pytest.raises(fasp_fx.StoreError, match=r"exists.*overwrite=True"):
        save(out)
    earlier = out.stat().st_ino
    save(out, overwrite=True)
    assert out.stat().st_ino != earlier
    (out / "notes.txt").write_text("mine")
    with pytest.raises(fasp_fx.StoreError, match="not a folder that save"):
        save(out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("kind", "error"), [("plain", OSError), ("plain", ValueError), ("hf", OSError)])
def test_nothing_half_written_is_left_of_models_of_transformers(
    kind: str, error: type[Exception], tmp_path: Path
) -> None:
    class Broken:
        """A tokenizer that cannot be saved."""

        def save_pretrained(self, folder: str) -> None:
            raise error("no vocabulary")

    with pytest.raises((fasp_fx.StoreError, ValueError), match="no vocabulary"):
        replace(kept(kind), tokenizer=Broken()).save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_where_it_is_saved(result: fasp_fx.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert result.save("a/b") == tmp_path / "a" / "b"
    fasp_fx.load("a/b")
    with pytest.raises(fasp_fx.StoreError, match="choose another path"):
        result.save("a/b/plan.json/out")


# --- checked before it is read


@pytest.mark.parametrize("name", [*folders.FILES, storage.MANIFEST])
def test_a_missing_truncated_or_changed_file_is_named(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    if name != storage.MANIFEST:
        (saved / name).write_bytes(content[:-1])
        with pytest.raises(fasp_fx.StoreError, match=rf"{name} has \d+ bytes.*save again"):
            fasp_fx.load(saved)
        (saved / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(fasp_fx.StoreError, match=rf"{name} was changed.*save the result again"):
            fasp_fx.load(saved)
    (saved / name).unlink()
    with pytest.raises(fasp_fx.StoreError, match=rf"{name} is missing.*"):
        fasp_fx.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "manifest.json is damaged: Invalid JSON"),
        ("[]", "manifest.json is damaged: Input should be an object"),
        ({"format": "fasp_fx/9", "fasp_fx": "7.0"}, r"fasp_fx/9.*load with fasp_fx 7\.0"),
        ({"kind": "other"}, "kind 'other', which is not known"),
        ({"files": {}}, "does not list graph.json"),
        ({"files": {"plan.json": {"size": -1, "sha256": ""}}}, r"files\.plan\.json\.size"),
    ],
)
def test_a_manifest_of_another_kind(saved: Path, change: str | dict[str, object], message: str) -> None:
    manifest = saved / storage.MANIFEST
    text = change if isinstance(change, str) else json.dumps({**json.loads(manifest.read_text()), **change})
    manifest.write_text(text)
    with pytest.raises(fasp_fx.StoreError, match=message):
        fasp_fx.load(saved)


def test_not_a_save(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(fasp_fx.StoreError, match=r"folder"):
            fasp_fx.load(path)
