"""The smaller model: module, program, plan and report."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from torch import fx, nn
from torch.export import ExportedProgram

from ..analysis.plan import PruningPlan
from ..base._undisturbed import in_usual_modes, one_at_a_time
from ..capturing._signature import CallSignature
from ..errors import ArgumentError, CaptureError
from ..passes._pruned_module import PrunedModule, program_now
from .config import PruningConfig
from .report import Report


@dataclass(frozen=True)
class Result:
    """What :func:`fasp_fx.prune` returns.

    Attributes:
        module: the smaller model behind the caller's signature; trains, moves, compiles and exports again. Of
            a model that cannot be captured as a whole, a copy with smaller parts in it.
        plan: what was removed.
        report: what it cost, and what was asked for.
        parts: of such a model, the result of each captured submodule, by its path; plans and reports in them
            use the names of the submodule.
        left: for each submodule that stayed whole, why.
    """

    module: fx.GraphModule
    plan: PruningPlan
    report: Report
    signature: CallSignature = field(repr=False)
    parts: Mapping[str, Result] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        before, after = self.report.parameters
        return f"Result(sparsity={self.plan.sparsity:.4f}, parameters={before:,} -> {after:,})"

    @property
    def program(self) -> ExportedProgram:
        """The same as an exported program, which shares its weights with ``module``, as they are now; put
        together when it is first asked for.

        Raises:
            StoreError: the module has lost a weight, or computes it from others; names it.
            CaptureError: the model was pruned in parts.
        """
        if self.is_in_parts:
            raise CaptureError(
                "a model pruned in parts has no single program; result.parts holds the result of each part,"
                " with its program"
            )
        return program_now(self.module)

    @property
    def is_in_parts(self) -> bool:
        """Whether the model was not captured as a whole."""
        return not isinstance(self.module, PrunedModule)

    @property
    def config(self) -> PruningConfig | None:
        """What was asked for, as far as it is known (:class:`fasp_fx.report.Report`)."""
        return self.report.config

    def with_report(self, **fields: Any) -> Self:
        """The same, sharing its module, with some fields of its report replaced."""
        found = copy.copy(self)
        object.__setattr__(found, "report", replace(self.report, **fields))
        return found

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the result to a new folder (see :mod:`fasp_fx.store`). Of a model pruned in parts, the code
        between them is not stored: :func:`fasp_fx.load` takes the dense model for it.

        Raises:
            StoreError: the path is taken or cannot be written, or the result holds something that cannot be
                stored.
        """
        from .saving._folder import save

        return save(self, path, overwrite=overwrite)

    @one_at_a_time
    @in_usual_modes
    def eager(self, model: nn.Module) -> nn.Module:
        """Make a smaller copy of the caller's own module, which trains as the caller's does: norms and
        dropouts follow ``train()`` and ``eval()``.

        The copy is of the model's class and holds the weights that ``module`` holds now, under their names in
        the model. Attributes that are sizes (``out_features``, ``num_heads``, …) are set to what the pruned
        program has in their places; captured as the model was, the copy is that program, node by node. Which
        parameters are trained, and which submodules are in training mode, is as in the model (docs/eager.md).

        Args:
            model: the model that was pruned, with the weights that it had then; it is left as it was, and
                shares no storage with the copy.

        Raises:
            EagerError: no copy is the program; says where they part, and what to do.
            PlanError: the model is not the one that the plan was made for.
        """
        from .eager import eager, eager_in_parts

        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model must be the nn.Module that was pruned, not {type(model).__name__}")
        if self.is_in_parts:
            parts = {path: (part.module, part.plan) for path, part in self.parts.items()}
            return eager_in_parts(self.module, self.plan, parts, model)
        return eager(self.module, self.plan, model)


__all__ = ["Result"]
