from ._analysis import (
    Analysis as Analysis,  # The coupled groups of one program, and what can be asked of them
)
from ._analysis import (
    analyze_program as analyze_program,  # Analyse a captured program; if split is given, let it split fused producers that a layout ties together
)
from ._depth import (
    DEPTH as DEPTH,  # the word of include= for it
)
from ._depth import (
    beside as beside,  # The value that all that is made of a consumer's output ends in a sum with
)
from ._depth import (
    goes_with_a_block as goes_with_a_block,  # Whether nothing but its result is lost with a call that serves a block
)
from ._depth import (
    laid_out as laid_out,  # Where a consumer's output has the shape of the model's activations: behind views that keep its last dimension
)
from ._depth import (
    serving as serving,  # The nodes that serve nothing but some consumers, last ones first: these themselves, what they alone need
)
from ._groups import (
    APPROXIMATE as APPROXIMATE,  # status of a group that can be pruned, though not mask-exact
)
from ._groups import (
    EXEMPT as EXEMPT,  # status of a group that the method leaves whole
)
from ._groups import (
    PRUNABLE as PRUNABLE,  # status of a group that can be pruned
)
from ._groups import (
    Conflict as Conflict,  # A tensor that would stop being a box: classes are the channel sets concerned
)
from ._groups import (
    Coupling as Coupling,  # The coupled groups of one program
)
from ._groups import (
    Group as Group,  # All channel sets with the same producers and the same consumers
)
from ._groups import (
    Groups as Groups,  # The coupled groups of a model, and those of them that are pruned
)
from ._groups import (
    Member as Member,  # One weight of a group: the channels indices along dim of the weight name belong to it
)
from ._groups import (
    by_block as by_block,  # The channel sets of each block, given the block of each channel set, shape [sets]
)
from ._groups import (
    ranges as ranges,  # Indices as compact text: 0-15,32,40-47
)
from ._plan import (
    FixedBuffer as FixedBuffer,  # A buffer or constant that the model reads and does not write into, and the digest of what it held
)
from ._plan import (
    ParameterSlice as ParameterSlice,  # The indices removed along one dimension of one weight; name is that of model.named_parameters()
)
from ._plan import (
    PlannedGroup as PlannedGroup,  # What one coupled group loses; granularity says what a channel set of it is
)
from ._plan import (
    PruningPlan as PruningPlan,  # Which channels go
)
from ._plan import (
    check_fingerprint as check_fingerprint,  # Refuse a model that the plan was not made for
)
from ._plan import (
    check_fixed as check_fixed,  # Refuse a model that does not compute what the one did that was pruned, though it has its parameters
)
from ._plan import (
    computed_fingerprint as computed_fingerprint,  # The fingerprint of all that a captured program (before its producers are split) computes with
)
from ._plan import (
    fixed_of as fixed_of,  # What a captured program reads besides parameters and does not write into
)
from ._plan import (
    gone_of as gone_of,  # For every channel number of the analysis, whether the plan removes it
)
from ._plan import (
    planned as planned,  # One entry per group; gone says for each channel number whether it is removed
)
from ._plan import (
    program_fingerprint as program_fingerprint,  # The fingerprint of a captured program (before its producers are split)
)
from ._plan import (
    running_fingerprint as running_fingerprint,  # The fingerprint of all that a captured program computes with, and of what it computes
)
from ._resources import (
    Counted as Counted,  # A sum of products of sizes, in whole numbers
)
from ._resources import (
    Products as Products,  # A sum of products of sizes; those that many products share are worked out once
)
from ._resources import (
    Resource as Resource,  # Something that is counted of a model, as a function of how many channel sets each group loses
)
from ._resources import (
    ShrinkingSize as ShrinkingSize,  # The size of one dimension of a tensor, as a function of what groups lose
)
from ._resources import (
    ShrinkingSizes as ShrinkingSizes,  # The sizes of a program's tensors as functions of what its groups lose
)
from ._resources import (
    Sparsity as Sparsity,  # The weights of linear, convolution and recurrent operators that a prunable, exempt or included group touches
)
from ._resources import (
    cache_of as cache_of,  # Bytes per token of one sequence that the caches among the outputs take: [batch, heads, length, width]
)
from ._resources import (
    parameters_of as parameters_of,  # All parameters of a program, tied ones once, or how much their numbers are, each of a weight
)
from .channels._facts import (
    Layout as Layout,  # How one operand of a contraction is read as [blocks, tokens or rows, columns]
)
from .channels._facts import (
    Pairs as Pairs,  # channel numbers that are coupled, entry by entry, and the node that couples them
)
from .channels._facts import (
    Product as Product,  # Activations contracted with each other along a dimension that holds the channels numbers
)
from .channels._facts import (
    Remark as Remark,  # Something said of a set of channel numbers, by a node; routing remarks do not hold for experts
)
from .channels._facts import (
    Use as Use,  # One use of a weight that contracts its columns with an activation
)
from .channels._interpreter import (
    Interpreter as Interpreter,  # Interprets one graph module
)
from .channels._interpreter import (
    Walk as Walk,  # The result: the value of every node (a tuple for several results), its executed shape, and the facts
)
from .channels._moves import (
    run_on_numbers as run_on_numbers,  # Move a tensor of numbers the way node moves its self; sizes and indices are those of the interpretation
)
from .channels._numbering import (
    NONE as NONE,  # the number of a position that is not a channel
)
from .channels._numbering import (
    Axis as Axis,  # One independent axis of channels of a tensor
)
from .channels._numbering import (
    Numbering as Numbering,  # Hands out numbers and finds the slot that a number belongs to
)
from .channels._numbering import (
    Slot as Slot,  # One dimension of one weight, graph input or created tensor; its channels are numbered base … base + size - 1
)
from .channels._numbering import (
    Value as Value,  # What is known of one tensor: its shape at the sizes chosen for the interpretation, and its channel axes
)
from .channels._numbering import (
    laid_by_block as laid_by_block,  # Values for the channels of each block, laid along a weight: along dim, and as the blocks divide block_dim
)
from .channels._numbering import (
    marked as marked,  # Whether each of the numbers below count is among some: a table in the place of a search
)
from .channels._regroup import (
    Repeating as Repeating,  # Numbers of a tensor that was interpreted at small sizes, as they lie at all sizes
)
from .channels._regroup import (
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
