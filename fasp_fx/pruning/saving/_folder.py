"""The folder of a result: written whole, and what is in it without the program (:mod:`fasp_fx.store` says
what the files hold).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ...analysis.plan import PruningPlan
from ...base._options import path_of
from ...errors import PlanError, StoreError
from ...storage._folder import new_save, read_text, write_json
from ...storage._graph_json import check_weights, program_to_json, signature_to_json
from ...storage._tensors import write_tensors
from ..report import Report

KIND = "whole"
TOLD = ("plan.json", "report.json")
PARTS_KIND = PARTS = "parts"
FILES = ("graph.json", "weights.safetensors", "constants.safetensors", "signature.json", *TOLD)
PARTS_FILES = ("parts.json", "rest.safetensors", "signature.json", *TOLD)
_Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Layout:
    """Every place of each part in the model, and what stayed whole, with the reason."""

    parts: list[Annotated[list[_Text], Field(min_length=1)]]
    left: dict[str, str]


def files_of(count: int) -> list[str]:
    """The files of so many parts."""
    return [f"{PARTS}/{index}/{name}" for index in range(count) for name in FILES]


def is_inside(name: str, paths: Iterable[str]) -> bool:
    """Whether a weight is one of a submodule at one of these paths."""
    return any(name.startswith(f"{path}.") for path in paths)


def save(result: Any, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a :class:`fasp_fx.Result` to a new folder, whole or not at all; as its method."""
    path = path_of(path, "path").absolute()
    with new_save(path, PARTS_KIND if result.is_in_parts else KIND, overwrite=overwrite) as folder:
        (_write_parts if result.is_in_parts else _write_whole)(folder, result)
    return path


def _write_whole(folder: Path, result: Any) -> None:
    program = result.program
    check_weights(program)
    write_json(folder / "signature.json", signature_to_json(result.signature))
    write_json(folder / "graph.json", program_to_json(program))
    write_tensors(folder / "weights.safetensors", program.state_dict)
    write_tensors(folder / "constants.safetensors", program.constants)
    write_told(folder, result.plan, result.report)


def _write_parts(folder: Path, result: Any) -> None:
    """Write the program of each part and the weights of everything else."""
    modules = list(result.module.named_modules(remove_duplicate=False))
    places = []
    for index, (name, part) in enumerate(result.parts.items()):
        found = [path for path, module in modules if module is part.module]
        if name not in found:
            raise StoreError(
                f"the part '{name}' no longer stands at its place in result.module, so it cannot be saved;"
                " save before exchanging modules"
            )
        places.append([name, *(path for path in found if path != name)])
        made = folder / PARTS / str(index)
        made.mkdir(parents=True)
        _write_whole(made, part)
    inside = list(chain(*places))
    held = result.module.state_dict(keep_vars=True)
    rest = {name: value for name, value in held.items() if not is_inside(name, inside)}
    write_tensors(folder / "rest.safetensors", rest)
    write_json(folder / "signature.json", signature_to_json(result.signature))
    write_json(folder / "parts.json", asdict(Layout(places, dict(result.left))))
    write_told(folder, result.plan, result.report)


def write_told(folder: Path, plan: PruningPlan, report: Report) -> None:
    """Write what was removed, and what it cost."""
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")


def read_told(folder: Path) -> tuple[PruningPlan, Report]:
    """The plan and the report of a save of any kind, without loading anything else.

    Raises:
        StoreError: a file is missing or damaged.
    """
    try:
        plan = PruningPlan.from_json(read_text(folder / "plan.json"))
    except PlanError as error:
        raise StoreError(f"plan.json is damaged: {error}; save the result again") from error
    return plan, Report.from_json(read_text(folder / "report.json"))


__all__ = [
    "FILES",
    "KIND",
    "PARTS",
    "PARTS_FILES",
    "PARTS_KIND",
    "TOLD",
    "Layout",
    "files_of",
    "is_inside",
    "read_told",
    "save",
    "write_told",
]
