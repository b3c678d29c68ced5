"""What pruning a model in parts returns, and how it is saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import nn
from torch.export import ExportedProgram

from ...analysis.plan import PruningPlan
from ...base._options import path_of
from ...capturing._signature import CallSignature
from ...errors import CaptureError, StoreError
from ...storage._folder import new_save, write_json
from ...storage._signature_json import signature_to_json
from ...storage._tensors import write_tensors
from .._result import Result
from ..report import Report
from ..saving._folder import FILES, TOLD, write_program, write_told

PARTS_KIND = "parts"
PARTS_FILES = ("parts.json", "rest.safetensors", "signature.json", *TOLD)
PARTS = "parts"
_Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Layout:
    """Every place of each part in the model, and what stayed whole, with the reason."""

    parts: list[Annotated[list[_Text], Field(min_length=1)]]
    left: dict[str, str]


def files_of(count: int) -> Iterator[str]:
    """The files of so many parts."""
    yield from (f"{PARTS}/{index}/{name}" for index in range(count) for name in FILES)


def is_inside(name: str, paths: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


class PartsResult(Result):
    """What :func:`fasp_fx.prune` returns for a model that cannot be captured as a whole.

    Attributes:
        module: a copy of the caller's model with the pruned parts in place of the submodules that were
            captured.
        parts: the result of each captured submodule, by its path; plans and reports in them use the names of
            the submodule.
        left: for each submodule that stayed whole, why.
        plan: what was removed, in the names of the whole model; :func:`fasp_fx.apply` replays it.
        report: the figures of all parts together; its notes say which parts there are and what was left.
    """

    parts: Mapping[str, Result]
    left: Mapping[str, str]

    def __init__(
        self,
        module: nn.Module,
        plan: PruningPlan,
        report: Report,
        signature: CallSignature,
        parts: Mapping[str, Result],
        left: Mapping[str, str],
    ) -> None:
        fields = {
            "module": module,
            "plan": plan,
            "report": report,
            "signature": signature,
            "parts": dict(parts),
            "left": dict(left),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def program(self) -> ExportedProgram:
        """A model pruned in parts has none.

        Raises:
            CaptureError: always; says where the programs of the parts are.
        """
        raise CaptureError(
            "a model pruned in parts has no single program; result.parts holds the result of each part, with"
            " its program"
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write plan, report, the program of each part and the weights of everything else to a new folder.

        The code between the parts is not stored: :func:`fasp_fx.load` takes the dense model for it.

        Raises:
            StoreError: the path is taken or cannot be written, or the result holds something that cannot be
                stored.
        """
        path = path_of(path, "path").absolute()
        places = [self._places(name) for name in self.parts]
        inside = list(chain(*places))
        held = self.module.state_dict(keep_vars=True)
        rest = {name: value for name, value in held.items() if not is_inside(name, inside)}
        with new_save(path, PARTS_KIND, overwrite=overwrite) as folder:
            for index, part in enumerate(self.parts.values()):
                made = folder / PARTS / str(index)
                made.mkdir(parents=True)
                write_program(made, part.program, part.signature, part.plan, part.report)
            write_told(folder, self.plan, self.report)
            write_json(folder / "signature.json", signature_to_json(self.signature))
            write_tensors(folder / "rest.safetensors", rest)
            write_json(folder / "parts.json", asdict(Layout(places, dict(self.left))))
        return path

    def _places(self, name: str) -> list[str]:
        """Every place of a part in the model, the one by which it is known first."""
        part = self.parts[name].module
        modules = self.module.named_modules(remove_duplicate=False)
        found = [path for path, module in modules if module is part]
        if name not in found:
            raise StoreError(
                f"the part '{name}' no longer stands at its place in result.module, so it cannot be saved;"
                " save before exchanging modules"
            )
        return [name, *(path for path in found if path != name)]

    def eager(self, model: nn.Module) -> nn.Module:
        """As :meth:`fasp_fx.Result.eager`; each part is held against its own program.

        Raises:
            EagerError: a part has no such copy, or shares a weight with what is around it; names the part.
            PlanError: the model is not the one that the plan was made for.
        """
        from ..eager._parts import eager_in_parts

        return eager_in_parts(self.module, self.plan, self.parts, model)

    def __repr__(self) -> str:
        return f"PartsResult(parts={list(self.parts)}, left={self.left}, sparsity={self.plan.sparsity:.4f})"

    __eq__ = object.__eq__
    __hash__ = object.__hash__


__all__ = ["PARTS", "PARTS_FILES", "PARTS_KIND", "Layout", "PartsResult", "files_of", "is_inside"]
