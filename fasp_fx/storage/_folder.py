"""Folders of saved results: written whole or not at all, with a manifest that lists every file, and read as
what somebody else may have filled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fasp_fx.base import Count, __version__, new_folder, parse, tolerable, write_text
from fasp_fx.errors import FaspError, StoreError, first_line

FORMAT = "fasp_fx/1"
MANIFEST = "manifest.json"
#: the graph of a hundred layers takes some ten million bytes, the plan of the largest published model some
#: thirty
JSON_BYTES = 2**27


@dataclass(frozen=True)
class _File:
    size: Count
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a manifest says: the kind of the save, the versions that it was made with, and every file."""

    format: str = "none"
    kind: str = "none"
    fasp_fx: str = __version__
    torch: str = torch.__version__
    files: dict[str, _File] = field(default_factory=dict)


@contextlib.contextmanager
def new_save(path: Path, kind: str, *, overwrite: bool, keep: bool = True) -> Iterator[Path]:
    """Give a folder to fill, which takes the name ``path``, with a manifest, when the block ends.

    Args:
        overwrite: replace an earlier save, of whatever kind, and nothing else.
        keep: ``False`` leaves nothing behind: it only finds out whether the folder could be made.

    Raises:
        StoreError: the path is taken or cannot be written.
    """
    with new_folder(path, replaceable=is_save if overwrite else None, keep=keep) as folder:
        yield folder
        write_manifest(folder, kind)


def write_manifest(folder: Path, kind: str, names: Iterable[str] = ()) -> None:
    """List files of a folder, or every one; all get the permissions that new files have here."""
    files = {
        name: _File((folder / name).stat().st_size, _sha256(folder / name))
        for name in names or _names(folder)
    }
    write_json(folder / MANIFEST, asdict(Manifest(FORMAT, kind, files=files)))
    mode = (folder / MANIFEST).stat().st_mode
    for name in files:  # safetensors keeps its files to their owner
        (folder / name).chmod(mode)


def _names(folder: Path) -> list[str]:
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}
    return sorted(files - {MANIFEST})


def read_manifest(folder: Path) -> Manifest:
    """What a folder holds a save of, and which files.

    Raises:
        StoreError: it holds none that can be read.
    """
    if not folder.is_dir():
        raise StoreError(f"'{folder}' is not a folder; give the folder that save() wrote")
    manifest = parse(Manifest, read_text(folder / MANIFEST), MANIFEST)
    if manifest.format != FORMAT:
        raise StoreError(
            f"{MANIFEST} has the format {manifest.format!r:.80}, this version reads {FORMAT!r}; save again,"
            f" or load with fasp_fx {manifest.fasp_fx:.40}"
        )
    return manifest


def is_save(folder: Path, *kinds: str) -> bool:
    """Whether a folder holds a save of one of these kinds, or of any, and nothing besides."""
    try:
        manifest = read_manifest(folder)
        return manifest.kind in (kinds or (manifest.kind,)) and manifest.files.keys() >= set(_names(folder))
    except tolerable(StoreError, OSError):
        return False


def verify(folder: Path, kind: str, names: Iterable[str]) -> None:
    """Hold files of a save against its manifest.

    Raises:
        StoreError: names the file and what is wrong.
    """
    manifest = read_manifest(folder)
    if manifest.kind != kind:
        raise StoreError(
            f"'{folder}' holds a save of the kind {manifest.kind!r:.80}, not {kind!r}; read it with"
            " fasp_fx.load"
        )
    sizes = {name: size_of(folder / name) for name in names}
    for name, size in sizes.items():  # all sizes are looked at before the first file is read
        if name not in manifest.files:
            raise StoreError(f"{MANIFEST} does not list {name}; save the result again")
        if size != manifest.files[name].size:
            raise StoreError(
                f"{name} has {size} bytes, {MANIFEST} says {manifest.files[name].size}: it is truncated or"
                " was changed; copy the folder or save again"
            )
    for name in sizes:
        if _sha256(folder / name) != manifest.files[name].sha256:
            raise StoreError(
                f"{name} was changed after it was saved (its SHA-256 differs from {MANIFEST}); copy the"
                " folder again, or save the result again"
            )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size_of(file: Path) -> int:
    """The number of bytes of a file.

    Raises:
        StoreError: it is missing, is no file, or is JSON and longer than any that is written.
    """
    try:
        status = file.stat()
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{file.name} is missing from '{file.parent}' ({first_line(error)}); give the folder that save()"
            " wrote, complete"
        ) from error
    if not stat.S_ISREG(status.st_mode) or (file.suffix == ".json" and status.st_size > JSON_BYTES):
        raise StoreError(
            f"{file.name} in '{file.parent}' has {status.st_size:,} bytes or is no file, and files of at most"
            f" {JSON_BYTES:,} are read; save the result again"
        )
    return status.st_size


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        StoreError: as :func:`size_of`, or it is not UTF-8.
    """
    size_of(file)
    with parsing(file.name):
        return file.read_text(encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        StoreError: there is none.
    """
    return parse(dict[str, Any], read_text(file), file.name)


def write_json(file: Path, data: Any) -> None:
    """Write data as JSON."""
    file.write_text(json.dumps(data), encoding="utf-8")


@contextlib.contextmanager
def parsing(name: str) -> Iterator[None]:
    """Turn whatever a reader of foreign data trips over into an error that names the file; the cause stays
    with it.

    Torch, sympy and transformers read what they wrote themselves and raise anything at what they did not.

    Raises:
        StoreError: the block raised something that is not ours.
    """
    try:
        yield
    except FaspError:
        raise
    except tolerable(Exception) as error:
        shown = f"{type(error).__name__}: {first_line(error)}"
        raise StoreError(
            f"{name} is damaged or forged, it holds what save() never writes ({shown:.300}); save the result"
            " again"
        ) from error


# --- Folders that keep the state of one run, so that the same call goes on from there.

RUN = "run.json"
RUN_FORMAT = "fasp_fx.run/1"


def claim(folder: Path, kind: str, run: Mapping[str, Any]) -> None:
    """Take a folder for a run, or go on with the run that it is of.

    Args:
        folder: made if missing.
        kind: of the run.
        run: what the run is of; equal for runs that give the same result.

    Raises:
        StoreError: the folder holds another run or something else, or cannot be written.
    """
    file, run = folder / RUN, {"format": RUN_FORMAT, "kind": kind, **run}
    refuse_other(folder)
    if not file.exists():
        write_text(file, json.dumps(run))
    stored = read_state(dict[str, Any], file)
    if different := sorted(name for name in {*run, *stored} if run.get(name) != stored.get(name)):
        raise StoreError(
            f"'{folder}' is the checkpoint of another run: {', '.join(different)} differ; choose another"
            " checkpoint=, or remove the folder"
        )


def refuse_other(folder: Path, option: str = "checkpoint=") -> None:
    """Refuse a folder that holds something else than the state of a run, and what is no folder.

    Args:
        option: what the caller gave it as.

    Raises:
        StoreError: it does, or cannot be read.
    """
    try:
        # what a process that was killed did not finish writing is hidden
        is_other = (
            folder.exists()
            and any(not path.name.startswith(".") for path in folder.iterdir())
            and not (folder / RUN).is_file()
        )
    except OSError as error:
        raise StoreError(
            f"'{folder}' cannot be used: {first_line(error)}; choose another {option}"
        ) from error
    if is_other:
        raise StoreError(f"'{folder}' holds something that is no checkpoint; choose another {option}")


def read_state(target: Any, file: Path) -> Any:
    """What JSON in a file of such a folder holds, as a dataclass.

    Raises:
        StoreError: it holds something else.
    """
    return parse(target, file.read_bytes(), f"'{file}'", "remove the folder that it is in")
