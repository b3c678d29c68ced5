from . import (
    allocation as allocation,  # how much goes of each group
    analysis as analysis,  # which channels go together
    base as base,  # what knows nothing of pruning
    calibration as calibration,  # what is seen, scored and repaired
    capturing as capturing,  # a model as a graph
    cli as cli,  # the command
    hf as hf,  # models that generate
    interop as interop,  # results elsewhere
    passes as passes,  # the only code that changes a program
    patterns as patterns,  # what operators do to channels
    pruning as pruning,  # configuration, driver, check, result
    storage as storage,  # files
    testing as testing,  # the harness for rules, passes and models
    training as training,  # choosing and regaining by gradients
)
from ._load import load as load
from .allocation._costs import CostCurve as CostCurve, Costs as Costs
from .analysis._analysis import Analysis as Analysis
from .analysis._groups import Group as Group
from .analysis._plan import ParameterSlice as ParameterSlice, PruningPlan as PruningPlan
from .base._offload import keep_weights as keep_weights, offload as offload
from .capturing._capture import Captured as Captured
from .errors import (  # what callers get on purpose
    ArgumentError as ArgumentError,
    BudgetError as BudgetError,
    CalibrationError as CalibrationError,
    CalibrationWarning as CalibrationWarning,
    CallError as CallError,
    CaptureError as CaptureError,
    CaptureWarning as CaptureWarning,
    EagerError as EagerError,
    ExportError as ExportError,
    FaspError as FaspError,
    NothingPrunableError as NothingPrunableError,
    OffloadError as OffloadError,
    PartialPlanWarning as PartialPlanWarning,
    PlanError as PlanError,
    RankError as RankError,
    RuleError as RuleError,
    SparsityError as SparsityError,
    StoreError as StoreError,
    TrainingMemoryError as TrainingMemoryError,
    VerificationError as VerificationError,
    VerificationWarning as VerificationWarning,
)
from .interop._backend import backend as backend
from .interop.page import to_html as to_html
from .pruning._agreement import Agreement as Agreement, agreement as agreement
from .pruning._config import PruningConfig as PruningConfig
from .pruning._prune import (
    analyze as analyze,
    apply as apply,
    capture as capture,
    measure as measure,
    plan_from_sets as plan_from_sets,
    prune as prune,
)
from .pruning._report import Report as Report
from .pruning._result import Result as Result
from .pruning._sweep import Sweep as Sweep, sweep as sweep
from .training._recovery import distil as distil

__version__: str

__all__ = [
    "Agreement",
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
    "Sweep",
    "TrainingMemoryError",
    "VerificationError",
    "VerificationWarning",
    "agreement",
    "allocation",
    "analysis",
    "analyze",
    "apply",
    "backend",
    "calibration",
    "capture",
    "distil",
    "hf",
    "interop",
    "keep_weights",
    "load",
    "measure",
    "offload",
    "passes",
    "patterns",
    "plan_from_sets",
    "prune",
    "sweep",
    "testing",
    "to_html",
    "training",
]
