from ._agreement import (
    Agreement as Agreement,  # How far a dense and a pruned model agree on some rows
    percent as percent,  # An estimate in percent, with its standard error where it has one
    with_agreement as with_agreement,  # A result with how far it agrees with the dense model in its report
)
from ._config import (
    FormatName as FormatName,  # formats of the files of language models (fasp_fx.hf)
    Granularity as Granularity,  # what one channel set is
    Include as Include,  # groups that stay unless they are asked for
    PruningConfig as PruningConfig,  # The options of one pruning
    PruningOptions as PruningOptions,  # The fields of PruningConfig as keyword arguments, for type checkers
    key_of as key_of,  # The text that says which code of the user's this is: its attribute key; None for a name
)
from ._method import (
    Constraint as Constraint,  # Which counts belong together, and which are possible, as a format of files says it
    Method as Method,  # How channels are chosen, and what stays is repaired
    Step as Step,  # Which numbers of channel sets of a group are possible
    allocate as allocate,  # How many channel sets each block of each chosen group loses
    allocation_of as allocation_of,  # The function that an allocation stands for
    expected_sparsity as expected_sparsity,  # The sparsity that is asked for, or that something else comes to where all groups lose alike
    open_budget as open_budget,  # How much of what was asked for may stay, as a budget of the groups that can be pruned and are not excluded
)
from ._prune import (
    Job as Job,  # What a pruning is given besides a model, options and data
    analyze as analyze,  # Find the coupled groups of a model
    apply as apply,  # Carry out a plan on the model it was made for, whatever chose it
    capture as capture,  # Capture a model as it behaves on the example inputs, once for several prunings
    measure as measure,  # Predict what each coupled group costs, channel set by channel set
    prune as prune,  # Make a model physically smaller; the caller's model is not touched
    prune_subject as prune_subject,  # The smaller model
)
from ._report import (
    COUNTED as COUNTED,  # the operators whose weights sparsity counts
    CurvePoint as CurvePoint,  # One evaluation of a training: after how many steps, the loss of the last step's batches (None before the first)
    Figure as Figure,  # Something measured of the dense and of the pruned model, such as perplexity; digits are those worth showing after the point
    Line as Line,  # One group: what it had, what it has, and the relative output error of its consumers, ‖X(W − V)ᵀ‖²_F / ‖XWᵀ‖²_F, the worst of them
    Recovery as Recovery,  # A training after pruning
    Report as Report,  # Figures of one pruning; str(report) is a table for people
    counted as counted,  # The groups whose weights sparsity is a fraction of
    line_of as line_of,  # The line of a group that nothing was removed from
    notes_of as notes_of,  # Remarks on the capture, and what to do about operators without a rule
    weight_size as weight_size,  # Number of parameters and their bytes; tied weights count once
)
from ._result import (
    CARD as CARD,  # the file that a hub shows
    MARK as MARK,  # a card with this line is written anew with each save
    SAVES as SAVES,  # the kinds of saves that read_result reads
    TOLD as TOLD,  # names of the files that say what was removed
    Result as Result,  # What fasp_fx.prune returns
    read_result as read_result,  # Read what Result.save wrote
    read_told as read_told,  # The plan and the report of a save of any kind, without loading anything else
    write_card as write_card,  # Write what to know of a pruned model: what went, how far it agrees, how it is loaded and was made
    write_told as write_told,  # Write what was removed, and what it cost
)
from ._subject import (
    Whole as Whole,  # A model that was captured as one program
    analyze_for as analyze_for,  # The groups of a program at the granularities that are asked for, or that a plan was made with
    make_plan as make_plan,  # What was decided, as data; result is the fingerprint of what came of it
    rewrite as rewrite,  # Take out of a program what was decided for its analysis, hold the result against the masked dense program, and report it
)
from ._sweep import (
    USUAL as USUAL,  # what is asked for, and what of it is measured, where nothing else is said
    Sweep as Sweep,  # What fasp_fx.sweep found; str(sweep) is a table, and a notebook shows pictures
    sweep as sweep,  # Predict what removing more and more would cost, of one measurement
    sweep_by as sweep_by,  # As sweep
)
from .check import (
    masked_program as masked_program,  # A program with the decided weights in place of its own and what was removed masked; tensors are shared
)
from .check._compare import (
    widened as widened,  # A type of real or complex numbers, or a tensor of it, in this precision if its own is lower; anything else as it is
)

__all__ = [
    "Agreement",
    "PruningConfig",
    "PruningOptions",
    "Report",
    "Result",
    "Sweep",
]
