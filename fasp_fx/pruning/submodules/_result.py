"""What pruning a model in parts returns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn
from torch.export import ExportedProgram

from ...analysis.plan import PruningPlan
from ...base._options import path_of
from ...capturing.calling._signature import CallSignature
from ...errors import CaptureError
from .._result import Result
from ..report import Report


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
        from ._save import save_parts

        report, signature = self.report, self.signature
        return save_parts(
            self.module, signature, self.plan, report, self.parts, self.left, path_of(path, "path"), overwrite
        )

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


__all__ = ["PartsResult"]
