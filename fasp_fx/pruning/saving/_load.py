"""A result of one program from its folder."""

from __future__ import annotations

from pathlib import Path

import torch

from ...passes._pruned_module import wrap
from ...storage._folder import parsing, read_json, read_text
from ...storage._graph_json import program_from_json
from ...storage._signature_json import signature_from_json
from ...storage._tensors import read_tensors
from .._result import Result
from ._folder import read_told


def read_program(folder: Path, device: torch.device | None) -> Result:
    """Read the files of a result, which were held against their manifest.

    Raises:
        StoreError: a file is damaged; names it and what to do.
    """
    plan, report = read_told(folder)
    signature = signature_from_json(read_text(folder / "signature.json"))
    weights, constants = (
        read_tensors(folder / f"{name}.safetensors", device) for name in ("weights", "constants")
    )
    program = program_from_json(read_json(folder / "graph.json"), weights, constants, device)
    with parsing("graph.json or signature.json"):  # each may be well-formed, and not fit the other
        return Result(wrap(program, signature), plan, report, signature)


__all__ = ["read_program"]
