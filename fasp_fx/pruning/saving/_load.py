"""A result of one program from its folder."""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import StoreError
from ...passes._pruned_module import wrap
from ...storage._files import parsing
from ...storage._graph_json import program_from_json
from ...storage._signature_json import check_fit, signature_from_json
from ...storage._tensors import read_tensors
from .._result import Result
from ._folder import read_json, read_plan, read_report, verify


def load_program(folder: Path, device: torch.device | None) -> Result:
    """Read a result that :func:`fasp_fx.store.save` wrote.

    Raises:
        StoreError: a file is missing, damaged, or of another format; names the file and what to do.
    """
    verify(folder)
    graph = read_json(folder / "graph.json")
    signature = signature_from_json(read_json(folder / "signature.json"))
    report, plan = read_report(folder), read_plan(folder)
    try:
        tensors = {
            name: read_tensors(folder / f"{name}.safetensors", graph["tensors"][name], device)
            for name in ("weights", "constants")
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"graph.json does not list the tensors: {type(error).__name__}: {error}; save the result again"
        ) from error
    program = program_from_json(graph, tensors["weights"], tensors["constants"], device)
    with parsing("graph.json or signature.json"):  # each may be well-formed, and not fit the other
        check_fit(program, signature)
        return Result(wrap(program, signature), plan, report, signature)


__all__ = ["load_program"]
