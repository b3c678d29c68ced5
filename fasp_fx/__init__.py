"""fasp_fx: make PyTorch models physically smaller, whatever their architecture.

A declarative structured-pruning compiler pass over ``torch.fx``, after FASP (arXiv 2501.09412).
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .base import __version__ as __version__
from .base import after_import
from .errors import (
    ArgumentError,
    BudgetError,
    CalibrationError,
    CalibrationWarning,
    CallError,
    CaptureError,
    CaptureWarning,
    EagerError,
    ExportError,
    FaspError,
    NothingPrunableError,
    OffloadError,
    PartialPlanWarning,
    PlanError,
    RankError,
    RuleError,
    SparsityError,
    StoreError,
    TrainingMemoryError,
    VerificationError,
    VerificationWarning,
)

if TYPE_CHECKING:
    from .allocation.costs import CostCurve, Costs
    from .analysis._analysis import Analysis
    from .analysis.groups import Group
    from .analysis.plan import ParameterSlice, PruningPlan
    from .base._offload import keep_weights, offload
    from .capturing._capture import Captured
    from .interop._backend import backend
    from .interop.page import to_html
    from .pruning._prune import analyze, apply, capture, measure, plan_from_sets, prune
    from .pruning._result import Result, load
    from .pruning.config import PruningConfig
    from .pruning.report import Report
    from .training.recovery import distil

#: where public names are defined, which are imported when they are used: that takes longer than torch itself
_HOMES = {
    **dict.fromkeys(("CostCurve", "Costs"), "allocation.costs"),
    "Analysis": "analysis._analysis",
    "Group": "analysis.groups",
    **dict.fromkeys(("ParameterSlice", "PruningPlan"), "analysis.plan"),
    **dict.fromkeys(("keep_weights", "offload"), "base._offload"),
    "Captured": "capturing._capture",
    "backend": "interop._backend",
    "to_html": "interop.page",
    **dict.fromkeys(("analyze", "apply", "capture", "measure", "plan_from_sets", "prune"), "pruning._prune"),
    "Result": "pruning._result",
    "PruningConfig": "pruning.config",
    "Report": "pruning.report",
    "load": "pruning._result",
    "distil": "training.recovery",
}
#: public modules by the names they are known by, where these are not the names of rooms
_FACES = {
    "budgets": "allocation.budgets",
    "channels": "analysis.channels",
    "config": "pruning.config",
    "costs": "allocation.costs",
    "evaluation": "cli.evaluation",
    "gates": "training.gates",
    "groups": "analysis.groups",
    "losses": "calibration.losses",
    "obs": "calibration.obs",
    "plan": "analysis.plan",
    "recovery": "training.recovery",
    "report": "pruning.report",
    "resources": "analysis.resources",
    "restoration": "calibration.restoration",
    "scoring": "calibration.scoring",
    "statistics": "calibration.statistics",
    "store": "pruning._result",
}


def _module(place: str) -> Any:
    """A module of the library; that which loads saves is told who reads those of rooms above it."""
    module: Any = import_module(f"fasp_fx.{place}")
    if place == _FACES["store"]:
        module.READERS |= {"hf": _read_pruned, "plain": _read_pruned}
    return module


class _Face(ModuleType):
    """What ``from fasp_fx.budgets import Macs`` finds: the module of that name, imported when it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # whoever looks through all modules imports none
            raise AttributeError(name)
        return getattr(_module(_FACES[self.__name__.rpartition(".")[2]]), name)


sys.modules.update({f"fasp_fx.{name}": _Face(f"fasp_fx.{name}") for name in _FACES})


def _read_pruned(folder: Any, device: Any) -> Any:
    from .hf._prune import read_pruned

    return read_pruned(folder, device)


# Importing transformers takes a second: its Auto classes are told of pruned models once they are there.
after_import("transformers.models.auto.configuration_auto", lambda: import_module("fasp_fx.hf._config"))


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(_module(_HOMES[name]), name)
    if name in ("cli", "hf", "passes", "patterns", "testing") or name in _FACES:
        return _module(_FACES.get(name, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_FACES, "cli", "hf", "testing"]


__all__ = [
    "Analysis",
    "ArgumentError",
    "BudgetError",
    "CalibrationError",
    "CalibrationWarning",
    "CallError",
    "CaptureError",
    "CaptureWarning",
    "Captured",
    "CostCurve",
    "Costs",
    "EagerError",
    "ExportError",
    "FaspError",
    "Group",
    "NothingPrunableError",
    "OffloadError",
    "ParameterSlice",
    "PartialPlanWarning",
    "PlanError",
    "PruningConfig",
    "PruningPlan",
    "RankError",
    "Report",
    "Result",
    "RuleError",
    "SparsityError",
    "StoreError",
    "TrainingMemoryError",
    "VerificationError",
    "VerificationWarning",
    "analyze",
    "apply",
    "backend",
    "capture",
    "distil",
    "keep_weights",
    "load",
    "measure",
    "offload",
    "passes",
    "patterns",
    "plan_from_sets",
    "prune",
    "to_html",
]
