"""The folder of a result: written whole, and what is in it without the program (:mod:`fasp_fx.store` says
what the files hold).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ...analysis.plan import PruningPlan
from ...base._atomic import new_folder
from ...base._options import path_of
from ...base._tolerable import tolerable
from ...base._version import __version__
from ...capturing.calling._signature import CallSignature
from ...errors import PlanError, StoreError
from ...storage._files import check_depth, check_length, opened, read_text, size_of, tensors_of
from ...storage._graph_json import check_weights, program_to_json
from ...storage._signature_json import signature_to_json
from ...storage._tensors import write_tensors
from ..report import Report
from ._report_json import report_from_json, report_to_json

FORMAT = "fasp_fx.store/6"
MANIFEST = "manifest.json"
FILES = (
    "graph.json",
    "weights.safetensors",
    "constants.safetensors",
    "plan.json",
    "report.json",
    "signature.json",
)


def save(
    program: ExportedProgram,
    called: CallSignature,
    plan: PruningPlan,
    report: Report,
    path: str | Path,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a result to a new folder, whole or not at all.

    Args:
        program: with the weights that are stored.
        called, plan, report: the result's.
        path: the folder to make.
        overwrite: replace an earlier save (and nothing else) of that name.

    Returns:
        The folder.

    Raises:
        StoreError: the path is taken or cannot be written, or the result holds something that cannot be
            stored.
    """
    path = path_of(path, "path").absolute()
    check_weights(program)
    signature, graph = signature_to_json(called), program_to_json(program)
    with new_folder(path, overwrite=overwrite, replaceable=is_save) as folder:
        write_json(folder / "plan.json", json.loads(plan.to_json()))
        write_json(folder / "report.json", report_to_json(report))
        write_json(folder / "signature.json", signature)
        mode = (folder / "plan.json").stat().st_mode
        tensors = {}
        for name, held in (("weights", program.state_dict), ("constants", program.constants)):
            file = folder / f"{name}.safetensors"
            tensors[name] = write_tensors(file, held)
            file.chmod(mode)
        write_json(folder / "graph.json", {**graph, "tensors": tensors})
        write_json(
            folder / MANIFEST,
            {"format": FORMAT, **versions(), "files": {name: listed(folder / name) for name in FILES}},
        )
    return path


def read_plan(folder: Path) -> PruningPlan:
    """The plan of a save.

    Raises:
        StoreError: it is missing or damaged.
    """
    try:
        return PruningPlan.from_json(read_text(folder / "plan.json"))
    except PlanError as error:
        raise StoreError(f"plan.json is damaged: {error}; save the result again") from error


def read_report(folder: Path) -> Report:
    """The report of a save, without loading anything else.

    Raises:
        StoreError: it is missing or damaged.
    """
    return report_from_json(read_json(folder / "report.json"))


def verify(folder: Path, expected: str = FORMAT, files: tuple[str, ...] = FILES) -> None:
    """Hold every file of a save against its manifest.

    Args:
        expected: the format that can be read.
        files: what must be there.

    Raises:
        StoreError: names the file and what is wrong.
    """
    if not folder.is_dir():
        raise StoreError(f"'{folder}' is not a folder; give the folder that save() wrote")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != expected:
        if expected == FORMAT and str(manifest.get("format")).startswith("fasp_fx.hf/"):
            raise StoreError(
                f"'{folder}' holds a language model of transformers; load it with"
                f" AutoModelForCausalLM.from_pretrained('{folder}')"
            )
        written = str(manifest.get("fasp_fx"))[:40]
        raise StoreError(
            f"{MANIFEST} has the format {manifest.get('format')!r:.80}, this version reads {expected!r}; save"
            f" again, or load with fasp_fx {written}"
        )
    entries = manifest.get("files")
    for name in files:  # all sizes are looked at before the first file is read
        file = folder / name
        entry = entries.get(name) if isinstance(entries, dict) else None
        if not isinstance(entry, dict):
            raise StoreError(f"{MANIFEST} does not list {name}; save the result again")
        size = size_of(file)
        if size != entry.get("size"):
            raise StoreError(
                f"{name} has {size} bytes, {MANIFEST} says {entry.get('size')!r:.80}: it is truncated or was"
                " changed; copy the folder or save again"
            )
        if file.suffix == ".json":
            check_length(file, size)
        if file.suffix == ".safetensors":
            tensors_of(file)
    for name in files:
        file, entry = folder / name, entries[name]  # type: ignore[index]
        if _sha256(file) != entry.get("sha256"):
            raise StoreError(
                f"{name} was changed after it was saved (its SHA-256 differs from {MANIFEST}); copy the"
                " folder again, or save the result again"
            )


def is_save(folder: Path) -> bool:
    """Whether a folder holds a save and nothing besides."""
    try:
        manifest = read_json(folder / MANIFEST)
    except tolerable(StoreError):
        return False
    known = {MANIFEST, *FILES}
    return str(manifest.get("format")).startswith("fasp_fx.store/") and all(
        child.name in known for child in folder.iterdir()
    )


def versions() -> dict[str, str]:
    """The versions that a save is made with."""
    return {"fasp_fx": __version__, "torch": torch.__version__}


def listed(file: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"size": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with opened(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, data: Any) -> None:
    """Write data as JSON."""
    file.write_text(json.dumps(data), encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        StoreError: there is none.
    """
    text = read_text(file)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file.name} cannot be read: {error}; save the result again") from error
    if not isinstance(data, dict):
        raise StoreError(f"{file.name} does not hold an object; save the result again")
    check_depth(data, file.name)
    return data


__all__ = [
    "FILES",
    "FORMAT",
    "MANIFEST",
    "is_save",
    "listed",
    "read_json",
    "read_plan",
    "read_report",
    "save",
    "verify",
    "versions",
    "write_json",
]
