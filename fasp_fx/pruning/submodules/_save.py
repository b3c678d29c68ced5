"""Results of models pruned in parts on disk: one save for each part, and the weights of everything around
them.

``parts/0``, ``parts/1``, … hold the files of :mod:`fasp_fx.store`; ``parts.json`` says where each stands in
the model and what stayed whole, ``rest.safetensors`` holds the parameters and persistent buffers outside of
the parts, ``plan.json``, ``report.json`` and ``signature.json`` what their names say, and ``manifest.json``
the size and SHA-256 of each file. The code between the parts is that of the model given to
:func:`load_parts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import nn

from ...analysis.plan import PruningPlan
from ...capturing.calling._signature import CallSignature
from ...errors import StoreError
from ...storage._folder import new_save, write_json
from ...storage._signature_json import signature_to_json
from ...storage._tensors import write_tensors
from .._result import Result
from ..report import Report
from ..saving._folder import FILES as PART
from ..saving._folder import TOLD, write_program, write_told

KIND = "parts"
FILES = ("parts.json", "rest.safetensors", "signature.json", *TOLD)
PARTS = "parts"
_Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Layout:
    """Every place of each part in the model, and what stayed whole, with the reason."""

    parts: list[Annotated[list[_Text], Field(min_length=1)]]
    left: dict[str, str]


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
    places = {name: _places(pruned, name, part) for name, part in parts.items()}
    rest = {
        name: value
        for name, value in pruned.state_dict(keep_vars=True).items()
        if not is_inside(name, chain(*places.values()))
    }
    with new_save(path, KIND, overwrite=overwrite) as folder:
        for index, part in enumerate(parts.values()):
            inside = folder / PARTS / str(index)
            inside.mkdir(parents=True)
            write_program(inside, part.program, part.signature, part.plan, part.report)
        write_told(folder, plan, report)
        write_json(folder / "signature.json", signature_to_json(called))
        write_tensors(folder / "rest.safetensors", rest)
        write_json(folder / "parts.json", asdict(Layout(list(places.values()), dict(left))))
    return path


def files_of(count: int) -> Iterator[str]:
    """The files of so many parts."""
    yield from (f"{PARTS}/{index}/{name}" for index in range(count) for name in PART)


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


__all__ = ["FILES", "KIND", "PARTS", "Layout", "files_of", "is_inside", "save_parts"]
