from ._allocating import (
    Constraint as Constraint,  # Which counts belong together, and which are possible, as a format of files says it
)
from ._allocating import (
    Step as Step,  # Which numbers of channel sets of a group are possible
)
from ._allocating import (
    allocate as allocate,  # How many channel sets each block of each of the budget's groups loses, and what there is to say of it
)
from ._allocating import (
    check_request as check_request,  # Validate a request before the costs are measured; arguments and errors as for allocate
)
from ._allocating import (
    expected_sparsity as expected_sparsity,  # The sparsity that is asked for, or that something else comes to where all groups lose alike
)
from ._allocating import (
    open_budget as open_budget,  # How much of what was asked for may stay, as a budget of the groups that can be pruned and are not excluded
)
from ._config import (
    FormatName as FormatName,  # formats of the files of language models (fasp_fx.hf)
)
from ._config import (
    Granularity as Granularity,  # what one channel set is
)
from ._config import (
    Include as Include,  # groups that stay unless they are asked for
)
from ._config import (
    PruningConfig as PruningConfig,  # The options of one pruning
)
from ._config import (
    PruningOptions as PruningOptions,  # The fields of PruningConfig as keyword arguments, for type checkers
)
from ._config import (
    key_of as key_of,  # The text that says which code of the user's this is: its attribute key; None for a name
)
from ._method import (
    Method as Method,  # How channels are chosen, and what stays is repaired
)
from ._method import (
    allocation_of as allocation_of,  # The function that an allocation stands for
)
from ._prune import (
    Job as Job,  # What a pruning is given besides a model, options and data
)
from ._prune import (
    analyze as analyze,  # Find the coupled groups of a model
)
from ._prune import (
    apply as apply,  # Carry out a plan on the model it was made for, whatever chose it
)
from ._prune import (
    capture as capture,  # Capture a model as it behaves on the example inputs, once for several prunings
)
from ._prune import (
    decide as decide,  # What goes of each program of a model, one after another
)
from ._prune import (
    measure as measure,  # Predict what each coupled group costs, channel set by channel set
)
from ._prune import (
    measure_subject as measure_subject,  # The cost curves of a model, on all of the batches; arguments and errors as for decide and fasp_fx.measure
)
from ._prune import (
    plan_from_sets as plan_from_sets,  # The plan that removes given channel sets, however they were chosen; apply carries it out
)
from ._prune import (
    prune as prune,  # Make a model physically smaller; the caller's model is not touched
)
from ._prune import (
    prune_subject as prune_subject,  # The smaller model
)
from ._prune import (
    replay as replay,  # What a plan takes of each program of a model, with what stays repaired where there are batches; as decide
)
from ._prune import (
    restoring_config as restoring_config,  # How to restore behind a plan
)
from ._report import (
    COUNTED as COUNTED,  # the operators whose weights sparsity counts
)
from ._report import (
    CurvePoint as CurvePoint,  # One evaluation of a training: after how many steps, the loss of the last step's batches (None before the first)
)
from ._report import (
    Figure as Figure,  # Something measured of the dense and of the pruned model, such as perplexity; digits are those worth showing after the point
)
from ._report import (
    Line as Line,  # One group: what it had, what it has, and the relative output error of its consumers, ‖X(W − V)ᵀ‖²_F / ‖XWᵀ‖²_F, the worst of them
)
from ._report import (
    Recovery as Recovery,  # A training after pruning
)
from ._report import (
    Report as Report,  # Figures of one pruning; str(report) is a table for people
)
from ._report import (
    Spent as Spent,  # One budget, and how it was kept
)
from ._report import (
    counted as counted,  # The groups whose weights sparsity is a fraction of
)
from ._report import (
    line_of as line_of,  # The line of a group that nothing was removed from
)
from ._report import (
    make_report as make_report,  # Assemble the report of one pruning
)
from ._report import (
    notes_of as notes_of,  # Remarks on the capture, and what to do about operators without a rule
)
from ._report import (
    spent as spent,  # How a budget was kept, where groups lose so many channel sets
)
from ._report import (
    weight_size as weight_size,  # Number of parameters and their bytes; tied weights count once
)
from ._report import (
    with_exclusions as with_exclusions,  # Lines that say by which pattern of exclude= their groups stay whole
)
from ._result import (
    SAVES as SAVES,  # the kinds of saves that read_result reads
)
from ._result import (
    TOLD as TOLD,  # names of the files that say what was removed
)
from ._result import (
    Result as Result,  # What fasp_fx.prune returns
)
from ._result import (
    read_result as read_result,  # Read what Result.save wrote
)
from ._result import (
    read_told as read_told,  # The plan and the report of a save of any kind, without loading anything else
)
from ._result import (
    write_told as write_told,  # Write what was removed, and what it cost
)
from ._subject import (
    Whole as Whole,  # A model that was captured as one program
)
from ._subject import (
    analyze_for as analyze_for,  # The groups of a program at the granularities that are asked for, or that a plan was made with
)
from ._subject import (
    make_plan as make_plan,  # What was decided, as data; result is the fingerprint of what came of it
)
from ._subject import (
    rewrite as rewrite,  # Take out of a program what was decided for its analysis, hold the result against the masked dense program, and report it
)
from .check._compare import (
    widened as widened,  # A type of real or complex numbers, or a tensor of it, in this precision if its own is lower; anything else as it is
)
from .check._reference import (
    masked_program as masked_program,  # A program with the decided weights in place of its own and what was removed masked; tensors are shared
)

__all__ = [
    "PruningConfig",
    "PruningOptions",
    "Report",
    "Result",
]
