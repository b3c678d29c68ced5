from . import (
    allocation as allocation,  # how much goes of each group
)
from . import (
    analysis as analysis,  # which channels go together
)
from . import (
    base as base,  # what knows nothing of pruning
)
from . import (
    calibration as calibration,  # what is seen, scored and repaired
)
from . import (
    capturing as capturing,  # a model as a graph
)
from . import (
    cli as cli,  # the command
)
from . import (
    hf as hf,  # models that generate
)
from . import (
    interop as interop,  # results elsewhere
)
from . import (
    passes as passes,  # the only code that changes a program
)
from . import (
    patterns as patterns,  # what operators do to channels
)
from . import (
    pruning as pruning,  # configuration, driver, check, result
)
from . import (
    storage as storage,  # files
)
from . import (
    testing as testing,  # the harness for rules, passes and models
)
from . import (
    training as training,  # choosing and regaining by gradients
)
from ._load import load as load
from .allocation._costs import CostCurve as CostCurve
from .allocation._costs import Costs as Costs
from .analysis._analysis import Analysis as Analysis
from .analysis._groups import Group as Group
from .analysis._plan import ParameterSlice as ParameterSlice
from .analysis._plan import PruningPlan as PruningPlan
from .base._offload import keep_weights as keep_weights
from .base._offload import offload as offload
from .capturing._capture import Captured as Captured
from .errors import (  # what callers get on purpose
    ArgumentError as ArgumentError,
)
from .errors import (
    BudgetError as BudgetError,
)
from .errors import (
    CalibrationError as CalibrationError,
)
from .errors import (
    CalibrationWarning as CalibrationWarning,
)
from .errors import (
    CallError as CallError,
)
from .errors import (
    CaptureError as CaptureError,
)
from .errors import (
    CaptureWarning as CaptureWarning,
)
from .errors import (
    EagerError as EagerError,
)
from .errors import (
    ExportError as ExportError,
)
from .errors import (
    FaspError as FaspError,
)
from .errors import (
    NothingPrunableError as NothingPrunableError,
)
from .errors import (
    OffloadError as OffloadError,
)
from .errors import (
    PartialPlanWarning as PartialPlanWarning,
)
from .errors import (
    PlanError as PlanError,
)
from .errors import (
    RankError as RankError,
)
from .errors import (
    RuleError as RuleError,
)
from .errors import (
    SparsityError as SparsityError,
)
from .errors import (
    StoreError as StoreError,
)
from .errors import (
    TrainingMemoryError as TrainingMemoryError,
)
from .errors import (
    VerificationError as VerificationError,
)
from .errors import (
    VerificationWarning as VerificationWarning,
)
from .interop._backend import backend as backend
from .interop.page import to_html as to_html
from .pruning._config import PruningConfig as PruningConfig
from .pruning._prune import analyze as analyze
from .pruning._prune import apply as apply
from .pruning._prune import capture as capture
from .pruning._prune import measure as measure
from .pruning._prune import plan_from_sets as plan_from_sets
from .pruning._prune import prune as prune
from .pruning._report import Report as Report
from .pruning._result import Result as Result
from .training._recovery import distil as distil

__version__: str

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
    "testing",
    "to_html",
    "training",
]
