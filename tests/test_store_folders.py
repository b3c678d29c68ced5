"""A save is whole or not there, replaces only its like, and is checked before it is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from saved import seal

import fasp_fx
from fasp_fx.pruning.saving import _folder as folders
from fasp_fx.storage._folder import MANIFEST

pytestmark = pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_save_leaves_nothing_behind(
    result: fasp_fx.Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    existing: bool,
) -> None:
    target = tmp_path / "deep" / "out"
    if existing:
        result.save(target)
    before = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}

    def fail(*args: object) -> None:
        raise error("interrupted")

    for place in ("write_tensors", "_sha256"):
        with monkeypatch.context() as patched:
            patched.setattr(folders, place, fail)
            with pytest.raises(error):
                result.save(target, overwrite=existing)
        assert {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()} == before
        assert len(list(tmp_path.rglob("*"))) == (2 + len(before) if existing else 0)
    if existing:
        fasp_fx.load(target)


@pytest.mark.parametrize("atomic", [True, False])
def test_overwrite_replaces_an_earlier_save_only_when_asked(
    result: fasp_fx.Result, saved: Path, monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    from fasp_fx.base import _atomic

    if not atomic:
        monkeypatch.setattr(_atomic, "_rename", lambda *args: False)
    with pytest.raises(fasp_fx.StoreError, match="overwrite=True"):
        result.save(saved)
    other = replace(result, plan=replace(result.plan, sparsity=0.125))
    assert other.save(saved, overwrite=True) == saved
    assert fasp_fx.load(saved).plan.sparsity == 0.125
    assert list(saved.parent.iterdir()) == [saved]


def test_a_failed_swap_keeps_the_earlier_save(
    result: fasp_fx.Result, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasp_fx.base import _atomic

    rename = Path.rename

    def only_aside(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(_atomic, "_rename", lambda *args: False)
    monkeypatch.setattr(Path, "rename", only_aside)
    with pytest.raises(fasp_fx.StoreError, match="no space"):
        result.save(saved, overwrite=True)
    fasp_fx.load(saved)
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("kind", ["file", "folder", "empty", "link", "extra"])
def test_overwrite_never_replaces_anything_else(result: fasp_fx.Result, saved: Path, kind: str) -> None:
    target = saved.parent / "mine"
    if kind == "file":
        target.write_text("mine")
    elif kind == "link":
        target.symlink_to(saved)
    elif kind == "extra":
        target = saved
        (saved / "notes.txt").write_text("mine")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "notes.txt").write_text("mine")
    before = sorted(saved.parent.rglob("*"))
    with pytest.raises(fasp_fx.StoreError, match="not a folder that save"):
        result.save(target, overwrite=True)
    assert sorted(saved.parent.rglob("*")) == before


def test_a_place_that_cannot_be_written(result: fasp_fx.Result, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(fasp_fx.StoreError, match="choose another path"):
        result.save(tmp_path / "file" / "out")


def test_parents_are_made(result: fasp_fx.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert result.save("a/b") == tmp_path / "a" / "b"
    fasp_fx.load("a/b")


@pytest.mark.parametrize("name", [*folders.FILES, MANIFEST])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(fasp_fx.StoreError, match=rf"{name} is missing.*"):
        fasp_fx.load(saved)


@pytest.mark.parametrize("name", folders.FILES)
def test_a_truncated_or_changed_file_is_named(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[:-1])
    with pytest.raises(fasp_fx.StoreError, match=rf"{name} has \d+ bytes.*save again"):
        fasp_fx.load(saved)
    (saved / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    with pytest.raises(fasp_fx.StoreError, match=rf"{name} was changed.*save the result again"):
        fasp_fx.load(saved)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "manifest.json cannot be read"),
        ("[]", "does not hold an object"),
        ('{"format": "fasp_fx.store/9", "fasp_fx": "7.0"}', "store/9.*load with fasp_fx 7.0"),
    ],
)
def test_a_manifest_of_another_kind(saved: Path, manifest: str, message: str) -> None:
    (saved / MANIFEST).write_text(manifest)
    with pytest.raises(fasp_fx.StoreError, match=message):
        fasp_fx.load(saved)


def test_a_file_left_out_of_the_manifest(saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    del manifest["files"]["plan.json"]
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(fasp_fx.StoreError, match=r"does not list plan\.json"):
        fasp_fx.load(saved)


def test_not_a_save(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(fasp_fx.StoreError, match=r"folder"):
            fasp_fx.load(path)


@pytest.mark.parametrize("name", [*folders.FILES])
def test_nonsense_behind_a_right_checksum_is_a_store_error(saved: Path, name: str) -> None:
    for content in (b"{}", b"\x00nonsense"):
        (saved / name).write_bytes(content)
        seal(saved, name)
        with pytest.raises(fasp_fx.StoreError):
            fasp_fx.load(saved)
