"""fasp_fx: make PyTorch models physically smaller, whatever their architecture.

A declarative structured-pruning compiler pass over ``torch.fx``, after FASP (arXiv 2501.09412).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from . import passes, patterns
from ._auto import register_when_needed
from ._captured import Captured, capture
from ._compile._backend import backend
from ._measure import measure
from ._offload._context import keep_weights, offload
from ._page import to_html
from ._plan_from_sets import plan_from_sets
from ._prune import analyze, apply, prune
from ._result import Result
from ._version import __version__ as __version__
from .analysis import Analysis
from .config import PruningConfig
from .costs import CostCurve, Costs
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
from .groups import Group
from .plan import ParameterSlice, PruningPlan
from .recovery import distil
from .report import Report
from .store import load

register_when_needed()


def __getattr__(name: str) -> Any:
    if name == "hf":  # needs transformers, which takes a second to import
        return import_module(".hf", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
