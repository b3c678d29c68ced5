"""The folder of a result: written whole, and what is in it without the program (:mod:`fasp_fx.store` says
what the files hold).
"""

from __future__ import annotations

from pathlib import Path

from torch.export import ExportedProgram

from ...analysis.plan import PruningPlan
from ...base._options import path_of
from ...capturing._signature import CallSignature
from ...errors import PlanError, StoreError
from ...storage._folder import new_save, read_text, write_json
from ...storage._graph_json import check_weights, program_to_json
from ...storage._signature_json import signature_to_json
from ...storage._tensors import write_tensors
from ..report import Report

KIND = "whole"
TOLD = ("plan.json", "report.json")
FILES = ("graph.json", "weights.safetensors", "constants.safetensors", "signature.json", *TOLD)


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
    with new_save(path, KIND, overwrite=overwrite) as folder:
        write_program(folder, program, called, plan, report)
    return path


def write_program(
    folder: Path, program: ExportedProgram, called: CallSignature, plan: PruningPlan, report: Report
) -> None:
    """Write the files of a result."""
    check_weights(program)
    write_json(folder / "signature.json", signature_to_json(called))
    write_json(folder / "graph.json", program_to_json(program))
    write_tensors(folder / "weights.safetensors", program.state_dict)
    write_tensors(folder / "constants.safetensors", program.constants)
    write_told(folder, plan, report)


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


__all__ = ["FILES", "KIND", "TOLD", "read_told", "save", "write_program", "write_told"]
