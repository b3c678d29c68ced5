"""Results of models pruned in parts on disk: one save for each part, and the weights of everything around
them.

``parts/0``, ``parts/1``, … are saves of :mod:`fasp_fx.store`; ``parts.json`` says where each stands in the
model and what stayed whole, ``rest.safetensors`` holds the parameters and persistent buffers outside of the
parts, ``plan.json``, ``report.json`` and ``signature.json`` what their names say, and ``manifest.json`` the
size and SHA-256 of each file. The code between the parts is that of the model given to :func:`load_parts`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

from torch import nn

from ...analysis.plan import PruningPlan
from ...base._atomic import new_folder
from ...base._tolerable import tolerable
from ...capturing.calling._signature import CallSignature
from ...errors import StoreError
from ...storage._signature_json import signature_to_json
from ...storage._tensors import write_tensors
from .._result import Result
from ..report import Report
from ..saving import _folder as folders
from ..saving._report_json import report_to_json

FORMAT = "fasp_fx.parts/5"
FILES = ("parts.json", "rest.safetensors", "plan.json", "report.json", "signature.json")
PARTS = "parts"


def save_parts(
    pruned: nn.Module,
    called: CallSignature,
    plan: PruningPlan,
    report: Report,
    parts: Mapping[str, Result],
    left: Mapping[str, str],
    path: Path,
    overwrite: bool,
) -> Path:
    """Write a result to a new folder, whole or not at all (see :meth:`PartsResult.save`)."""
    path = path.absolute()
    signature = signature_to_json(called)
    places = {name: _places(pruned, name, part) for name, part in parts.items()}
    rest = {
        name: value
        for name, value in pruned.state_dict(keep_vars=True).items()
        if not is_inside(name, chain(*places.values()))
    }
    with new_folder(path, overwrite=overwrite, replaceable=_is_save) as folder:
        for index, part in enumerate(parts.values()):
            part.save(folder / PARTS / str(index))
        folders.write_json(folder / "plan.json", json.loads(plan.to_json()))
        folders.write_json(folder / "report.json", report_to_json(report))
        folders.write_json(folder / "signature.json", signature)
        tensors = write_tensors(folder / "rest.safetensors", rest)
        (folder / "rest.safetensors").chmod((folder / "plan.json").stat().st_mode)
        folders.write_json(
            folder / "parts.json",
            {"parts": list(places.values()), "left": dict(left), "tensors": tensors},
        )
        files = (*FILES, *manifests(len(places)))
        listed = {name: folders.listed(folder / name) for name in files}
        folders.write_json(
            folder / folders.MANIFEST, {"format": FORMAT, **folders.versions(), "files": listed}
        )
    return path


def is_parts(folder: Path) -> bool:
    """Whether a folder holds a model pruned in parts, of whatever version."""
    try:
        return str(folders.read_json(folder / folders.MANIFEST).get("format")).startswith("fasp_fx.parts/")
    except tolerable(StoreError):
        return False


def _is_save(folder: Path) -> bool:
    known = {folders.MANIFEST, PARTS, *FILES}
    inside = folder / PARTS
    return (
        is_parts(folder)
        and all(child.name in known for child in folder.iterdir())
        and (not inside.is_dir() or all(map(folders.is_save, inside.iterdir())))
    )


def manifests(count: int) -> tuple[str, ...]:
    return tuple(f"{PARTS}/{index}/{folders.MANIFEST}" for index in range(count))


def _places(model: nn.Module, name: str, part: Result) -> list[str]:
    """Every place of a part in the model, the one by which it is known first."""
    found = [path for path, module in model.named_modules(remove_duplicate=False) if module is part.module]
    if name not in found:
        raise StoreError(
            f"the part '{name}' no longer stands at its place in result.module, so it cannot be saved; save"
            " before exchanging modules"
        )
    return [name, *(path for path in found if path != name)]


def is_inside(name: str, paths: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


__all__ = ["FILES", "FORMAT", "PARTS", "is_inside", "is_parts", "manifests", "save_parts"]
