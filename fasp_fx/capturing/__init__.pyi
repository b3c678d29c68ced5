from ._assemble import (
    Assembly as Assembly,  # All that an exported program is put together of, but for the values of its tensors
    argument_of as argument_of,  # What an exported program says that an input or an output is
    ready as ready,  # What the exported program of a graph module is put together of, when somebody asks for it
)
from ._capture import (
    Captured as Captured,  # A model as a graph over its own weights, which it shares
    Model as Model,  # what can be captured: a module or an exported program
    capture as capture,  # Capture model as it behaves on the example inputs
    capture_whole as capture_whole,  # Capture a model as one program; arguments and errors as for fasp_fx.capture
    check_given as check_given,  # Refuse to say of a captured model what its capture was told
    in_training as in_training,  # Names of the submodules in training mode; graphs were captured in one mode and have no other
    recapture as recapture,  # The same model after exported was made of it; inputs keep their names, weights are known by theirs
)
from ._compare_with_model import (
    coarsest as coarsest,  # The floating-point type of the lowest precision among all that the program computes
    trouble_with as trouble_with,  # What is wrong with what a program computes, in words, where it is to be what the model does
)
from ._export import (
    export_again as export_again,  # Export a rewritten graph module; guards, ranges and recorded shapes are made anew
)
from ._fold import (
    WHY_NOT_FOLDED as WHY_NOT_FOLDED,  # key of node.meta under which a node that computes a weight says why no parameter stands in its place
)
from ._functional import (
    is_plain as is_plain,  # Whether a node of a graph with its weights as attributes is no call but of an operator and what an exporter leaves beside those
    take_apart as take_apart,  # Write operators without a rule that are made of others, and assignments to slices, as what they are made of
)
from ._fx import (
    WRITTEN_BY as WRITTEN_BY,  # key of node.meta, and of node.meta["custom"], under which a node that a pass wrote carries the pass's name
    arguments as arguments,  # The arguments of a call by their declared names, defaults included; by position where the target declares none
    attribute as attribute,  # The attribute of a nested module by its dotted path
    call_in_words as call_in_words,  # What a node is called with, as far as what it gives on tensors without values depends on it
    draws as draws,  # Whether a node draws random numbers
    elements as elements,  # Arguments with those that are lists taken apart, name.0, name.1 …, as rules name them
    is_pure as is_pure,  # Whether a call does nothing but compute its result, always the same of the same arguments
    put_behind as put_behind,  # Let what reads a node read what a function makes of it and further arguments: the new node
    read_stamps as read_stamps,  # Show again what an export kept of the stamps
    results as results,  # The graph's results in order
    set_argument as set_argument,  # Set an argument by its declared name; whether that changed it
    stamp as stamp,  # Mark a node as written by the pass name; provenance such as the module stack is taken from like
    target_name as target_name,  # The dotted path that a get_attr node reads
    tied_names as tied_names,  # For each name of a parameter, all names of that parameter, itself among them
    viewed as viewed,  # The node whose storage a node shows: to write into a view, or into what is detached, is to write into that
    views_may_copy as views_may_copy,  # Let changes of shape copy where no view can be
    way_from_weight as way_from_weight,  # The nodes that lead from a weight to an operand which holds it, moved or cast; both included
    weights_of as weights_of,  # Every parameter and buffer of a module by name; tied ones under each of their names
    written_by as written_by,  # The nodes whose storage a node writes into
    written_names as written_names,  # The names of the tensors that a graph looks up and writes into
)
from ._parts import (
    Call as Call,  # The arguments of one call
    Parts as Parts,  # A model that was captured by its submodules
    model_copy as model_copy,  # A copy of a model that shares no storage
    replace_submodule as replace_submodule,  # Place a module at each of its paths
    watching as watching,  # Report every call that one of some modules gets inside, with copies of what it gets
    with_attributes_of as with_attributes_of,  # A pruned part with the simple attributes of the original, which copies and pickles keep
)
from ._program import (
    Cut as Cut,  # Which indices stay along one dimension
    ExportFacts as ExportFacts,  # How a captured program is called and what its sizes may be
    FoldedWeight as FoldedWeight,  # A weight that the model computes from sources in every call, and that the program holds as a parameter of its own
    Program as Program,  # One model between capture and result
    Recipe as Recipe,  # How a weight is made
    SplitWeight as SplitWeight,  # A weight that holds the given rows of a fused weight of the model, in this order, before removal
    copy_graph as copy_graph,  # A copy of a graph, to be changed; what is recorded of its output stays with it
    graph_module as graph_module,  # A graph module over the tensors of root, of the class kind
    region as region,  # What tells the storage of a weight from that of others; tied weights share it
    set_weight as set_weight,  # Replace a parameter or buffer by its dotted name, keeping its kind, or add a parameter under a new name
)
from ._rewrites import (
    FLEX as FLEX,  # torch's flexible attention
    make_traceable as make_traceable,  # Let a compiler trace the flex attention of an exported graph; changes the graph
    own_names as own_names,  # Rename nodes of a graph called like a weight of its module that they are not: inputs, and tensors that a graph makes
)
from ._runner import (
    Runner as Runner,  # Executes nodes in graph order for all batches; a value lives until its last use
    record as record,  # Bring node.meta["val"] of every node up to date; placeholders keep theirs
)
from ._shapes import (
    by_shapes as by_shapes,  # What is traced inside takes a fraction of the time, and recurrent operators do not fix the number of steps
)
from ._signature import (
    HELD as HELD,  # Stands for a tensor, or for an object that knows its own tensors (a cache, say)
    CallerCodeGen as CallerCodeGen,  # Generates a forward with the caller's signature that refuses what was not captured
    CallSignature as CallSignature,  # The parameters of the caller's forward, and which of them were captured
    Guards as Guards,  # Stands where torch puts the module of its guards, which it wraps
    float_types as float_types,  # The types of those tensors that hold real numbers
    guard_calls as guard_calls,  # Let the guards in the module of an exported program fail with CallError; types as for Guards
)
from ._sizes import (
    Size as Size,  # One size as a product: an integer times sizes that vary from call to call; value is what it is in the interpretation
    Sizes as Sizes,  # Turns symbolic shapes recorded at capture into integers, all by the same assignment of symbols
    is_dynamic as is_dynamic,  # Whether a recorded size varies from call to call; a symbol that the capture has settled does not
    lower_bound as lower_bound,  # The smallest value that the capture had in mind for a dynamic size
    recorded_shapes as recorded_shapes,  # The dynamic dimensions of a captured program and their ranges, to export it again with the same freedom
    same_sizes as same_sizes,  # Whether recorded sizes are the same whatever their symbols stand for
    upper_bound as upper_bound,  # The largest value that the capture allows for a dynamic size, or None if there is no limit
)
from ._submodules import (
    capture_model as capture_model,  # A model as one program, or else in parts
)
from ._unchanged import (
    copied as copied,  # Arguments that a call may write into, or outputs that can be buffers, as they are now
    noting_reads as noting_reads,  # Note every attribute of a model's modules that is read meanwhile, but of those that the copy has as well
    rewound as rewound,  # As unchanged, and put back the values of buffers and the state of the random numbers, which start from seed inside
    said_of_reads as said_of_reads,  # What is wrong with a copy that reads these attributes of a model, in words
)

__all__ = [
    "Captured",
]
