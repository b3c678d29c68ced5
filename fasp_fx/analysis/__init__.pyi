from ._analysis import (
    Analysis as Analysis,  # The coupled groups of one program, and what can be asked of them
    analyze_program as analyze_program,  # Analyse a captured program; if split is given, let it split fused producers that a layout ties together
)
from ._depth import (
    DEPTH as DEPTH,  # the word of include= for it
    beside as beside,  # The value that all that is made of a consumer's output ends in a sum with
    goes_with_a_block as goes_with_a_block,  # Whether nothing but its result is lost with a call that serves a block
    laid_out as laid_out,  # Where a consumer's output has the shape of the model's activations: behind views that keep its last dimension
    serving as serving,  # The nodes that serve nothing but some consumers, last ones first: these themselves, what they alone need
)
from ._groups import (
    APPROXIMATE as APPROXIMATE,  # status of a group that can be pruned, though not mask-exact
    EXEMPT as EXEMPT,  # status of a group that the method leaves whole
    PRUNABLE as PRUNABLE,  # status of a group that can be pruned
    Group as Group,  # All channel sets with the same producers and the same consumers
    Groups as Groups,  # The coupled groups of a model, and those of them that are pruned
    Member as Member,  # One weight of a group: the channels indices along dim of the weight name belong to it
    by_block as by_block,  # The channel sets of each block, given the block of each channel set, shape [sets]
)
from ._plan import (
    ParameterSlice as ParameterSlice,  # The indices removed along one dimension of one weight; name is that of model.named_parameters()
    PlannedGroup as PlannedGroup,  # What one coupled group loses; granularity says what a channel set of it is
    PruningPlan as PruningPlan,  # Which channels go
    check_fingerprint as check_fingerprint,  # Refuse a model that the plan was not made for
    check_fixed as check_fixed,  # Refuse a model that does not compute what the one did that was pruned, though it has its parameters
    check_structure as check_structure,  # Refuse a model whose parameters have other names or shapes than those of the model that the plan was made for
    computed_fingerprint as computed_fingerprint,  # The fingerprint of all that a captured program (before its producers are split) computes with
    fixed_of as fixed_of,  # What a captured program reads besides parameters and does not write into
    gone_of as gone_of,  # For every channel number of the analysis, whether the plan removes it
    planned as planned,  # One entry per group; gone says for each channel number whether it is removed
    program_fingerprint as program_fingerprint,  # The fingerprint of a captured program (before its producers are split)
    running_fingerprint as running_fingerprint,  # The fingerprint of all that a captured program computes with, and of what it computes
    shapes_of as shapes_of,  # The names and shapes of parameters
    steps_to as steps_to,  # Those of the earlier plans of a chain that a model is still to go through, by the shapes of its parameters
    strange_weight as strange_weight,  # A weight that a model has in another shape than the one the plan was made for, in words
)
from ._resources import (
    Counted as Counted,  # A sum of products of sizes, in whole numbers
    Resource as Resource,  # Something that is counted of a model, as a function of how many channel sets each group loses
    ShrinkingSizes as ShrinkingSizes,  # The sizes of a program's tensors as functions of what its groups lose
    Sparsity as Sparsity,  # The weights of linear, convolution and recurrent operators that a prunable, exempt or included group touches
    cache_of as cache_of,  # Bytes per token of one sequence that the caches among the outputs take: [batch, heads, length, width]
    parameters_of as parameters_of,  # All parameters of a program, tied ones once, or how much their numbers are, each of a weight
)
from .channels._facts import (
    Layout as Layout,  # How one operand of a contraction is read as [blocks, tokens or rows, columns]
    Pairs as Pairs,  # channel numbers that are coupled, entry by entry, and the node that couples them
    Product as Product,  # Activations contracted with each other along a dimension that holds the channels numbers
    Remark as Remark,  # Something said of a set of channel numbers, by a node; routing remarks do not hold for experts
    Use as Use,  # One use of a weight that contracts its columns with an activation
)
from .channels._interpreter import (
    Interpreter as Interpreter,  # Interprets one graph module
    Walk as Walk,  # The result: the value of every node (a tuple for several results), its executed shape, and the facts
)
from .channels._moves import (
    run_on_numbers as run_on_numbers,  # Move a tensor of numbers the way node moves its self; sizes and indices are those of the interpretation
)
from .channels._numbering import (
    NONE as NONE,  # the number of a position that is not a channel
    Axis as Axis,  # One independent axis of channels of a tensor
    Numbering as Numbering,  # Hands out numbers and finds the slot that a number belongs to
    Slot as Slot,  # One dimension of one weight, graph input or created tensor; its channels are numbered base … base + size - 1
    Value as Value,  # What is known of one tensor: its shape at the sizes chosen for the interpretation, and its channel axes
    laid_by_block as laid_by_block,  # Values for the channels of each block, laid along a weight: along dim, and as the blocks divide block_dim
    marked as marked,  # Whether each of the numbers below count is among some: a table in the place of a search
)
from .channels._regroup import (
    Repeating as Repeating,  # Numbers of a tensor that was interpreted at small sizes, as they lie at all sizes
    repeating as repeating,  # How numbers lie at all sizes; None where they do not repeat along a dimension whose size varies
)

__all__ = [
    "Analysis",
    "Group",
    "Member",
    "ParameterSlice",
    "PlannedGroup",
    "PruningPlan",
    "Resource",
]
