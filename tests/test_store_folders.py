"""A save is whole or not there, replaces only its like, and is checked before it is read; what was saved
once is read for ever.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from saved import GOLDEN, MAKERS, forked, outputs

import fasp_fx
from fasp_fx.pruning import _result as folders
from fasp_fx.storage import _folder as storage

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
        budget=fasp_fx.allocation.Parameters(0.8), exclude=("lm_head",), drift=0.3
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


@pytest.fixture(scope="module")
def result() -> fasp_fx.Result:
    return fasp_fx.load(GOLDEN / "whole")


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

    def fail(*args: object) -> None:
        raise error("interrupted")

    for module, place in ((folders, "write_tensors"), (storage, "_sha256")):
        with monkeypatch.context() as patched:
            patched.setattr(module, place, fail)
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


def _of_another_kind(mine: Path, saved: Path) -> None:
    manifest = shutil.copytree(saved, mine) / storage.MANIFEST
    manifest.write_text(manifest.read_text().replace('"whole"', '"hf"'))


#: what stands where a result shall be saved, beside a save
TAKEN: dict[str, Callable[[Path, Path], object]] = {
    "file": lambda mine, saved: mine.write_text("mine"),
    "empty": lambda mine, saved: mine.mkdir(),
    "folder": lambda mine, saved: (mine / "deep").mkdir(parents=True),
    "link": lambda mine, saved: mine.symlink_to(saved),
    "extra": lambda mine, saved: (shutil.copytree(saved, mine) / "notes.txt").write_text("mine"),
    "of another kind": _of_another_kind,
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
def test_results_of_every_kind_replace_only_their_like(kind: str, tmp_path: Path) -> None:
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
