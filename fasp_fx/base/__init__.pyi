from ._atomic import (
    new_file as new_file,  # Give a temporary sibling of path to write; it takes the name path when the block ends
)
from ._atomic import (
    new_folder as new_folder,  # Give a temporary sibling of path to fill; it takes the name path when the block ends
)
from ._atomic import (
    write_text as write_text,  # Put text in the place of what a file holds, whole or not at all
)
from ._bisect import (
    largest_passing_subset as largest_passing_subset,  # A part of items without fault that no other item can join
)
from ._compare import (
    built_alike as built_alike,  # Whether two containers, or what else is registered as such, are built alike of parts that are the same
)
from ._compare import (
    deviation as deviation,  # max|a − b| / max|b| of two outputs, of fillings by themselves; infinite where they cannot be compared
)
from ._compare import (
    distance as distance,  # ‖a − b‖₂ / ‖b‖₂ of two tensors of real numbers, without large entries that are the same (see deviation)
)
from ._compare import (
    tolerance as tolerance,  # How far apart values of a type may be (TOLERANCE); 0 for integers
)
from ._compare import (
    unfilled as unfilled,  # The values where what is expected is neither infinite nor a filling, flat if any is
)
from ._device import (
    check_device as check_device,  # The device of a name, if it can be used
)
from ._device import (
    device_named as device_named,  # The device of a name; that of the CPU has no number, as tensors there say it
)
from ._device import (
    device_of as device_of,  # The device of a model's weights
)
from ._device import (
    float32_products as float32_products,  # Within it, products of float32 have a precision by torch.set_float32_matmul_precision
)
from ._device import (
    multiplies_bfloat16 as multiplies_bfloat16,  # Whether a device multiplies matrices of bfloat16 in hardware
)
from ._device import (
    products_in_bfloat16 as products_in_bfloat16,  # Within it, products are computed in bfloat16 by autocast, if wanted
)
from ._json import (
    Count as Count,  # a number of things, or an index, as large as a size of a tensor can be
)
from ._json import (
    ReadBy as ReadBy,  # Annotates a field whose value is made by a function of what JSON holds, whatever its type
)
from ._json import (
    from_document as from_document,  # What a document of that kind holds
)
from ._json import (
    parse as parse,  # What a text of JSON holds; fields that are not known are left out
)
from ._json import (
    to_document as to_document,  # A document of its own, which from_document reads
)
from ._offload import (
    Scratch as Scratch,  # Files in a folder that hold tensors, and have no name there: what no tensor uses is freed, whatever becomes of the process
)
from ._offload import (
    addresses as addresses,  # Where the memory of tensors lies that keep_values would move
)
from ._offload import (
    computing as computing,  # Where calibration batches run while their model lies in files, if that is not the CPU
)
from ._offload import (
    keep as keep,  # A tensor as large as a weight that will be needed later: in a file inside of fasp_fx.offload, as it is elsewhere
)
from ._offload import (
    keep_values as keep_values,  # The same values, with their memory in files inside of fasp_fx.offload
)
from ._offload import (
    keep_weights as keep_weights,  # Put the parameters and buffers of a model into files
)
from ._offload import (
    moved as moved,  # The same values on another device
)
from ._offload import (
    offload as offload,  # Keep weights in files while a model is pruned: those that are made inside, and those given to keep_weights
)
from ._offload import (
    zeros as zeros,  # Zeros that will be needed later, kept as keep does
)
from ._options import (
    check_callable as check_callable,  # Refuse arguments that are to be called and cannot be
)
from ._options import (
    configured as configured,  # A configuration with some options in the place of its own
)
from ._options import (
    is_number as is_number,  # Whether a value is a finite number that a float can hold, and no truth value
)
from ._options import (
    names_of as names_of,  # The names that an option was given, as a tuple
)
from ._options import (
    path_of as path_of,  # A path that an argument gives
)
from ._progress import (
    Shown as Shown,  # what progress= takes: a function that is called with the fraction done; None: a bar in a terminal or a notebook
)
from ._progress import (
    advance_of as advance_of,  # The function to call with the fraction done
)
from ._progress import (
    bar_on as bar_on,  # A bar with the time that remains, which goes when the work is done; none in a file or a pipe
)
from ._progress import (
    between as between,  # The progress of a step, as a part of that of all
)
from ._progress import (
    process as process,  # What torchrun says of this process: RANK, LOCAL_RANK or WORLD_SIZE
)
from ._progress import (
    shows as shows,  # Have a function be given a function as progress, whatever its caller gives (Shown)
)
from ._stamps import (
    WRITTEN_BY as WRITTEN_BY,  # key of node.meta, and of node.meta["custom"], under which a node that a pass wrote carries the pass's name
)
from ._stamps import (
    read_stamps as read_stamps,  # Show again what an export kept of the stamps
)
from ._stamps import (
    stamp as stamp,  # Mark a node as written by the pass name; provenance such as the module stack is taken from like
)
from ._stamps import (
    stand_for as stand_for,  # Say of a node that it comes from where like does: without its module stack, torch cannot unflatten the program
)
from ._tensors import (
    digest_of as digest_of,  # What tells calibration data from others: types, shapes and values
)
from ._tensors import (
    fingerprint as fingerprint,  # A digest of names, shapes and all values, the same on any device; of tensors without values
)
from ._tensors import (
    laid_otherwise as laid_otherwise,  # A copy that lies so
)
from ._tensors import (
    lying_otherwise as lying_otherwise,  # A tensor of the same shape and type, without its values
)
from ._tensors import (
    storage_of as storage_of,  # What tells whether two tensors share memory, also where they hold no values; for anything else
)
from ._tensors import (
    without_values as without_values,  # A tensor of the same kind on the meta device
)
from ._tolerable import (
    short_of_memory as short_of_memory,  # What to catch where smaller pieces may fit: anything, if memory is short, the host's or a device's
)
from ._tolerable import (
    tolerable as tolerable,  # The kinds of exceptions to catch where one is taken for "this did not work"
)
from ._undisturbed import (
    drawing_alike as drawing_alike,  # Random numbers that a model draws (dropout that is always on, say) start from a seed inside
)
from ._undisturbed import (
    generator_of as generator_of,  # Random numbers of their own for each place, on the CPU; arguments as for seed_of
)
from ._undisturbed import (
    in_usual_modes as in_usual_modes,  # Have a function run outside of the caller's inference mode, no_grad and autocast
)
from ._undisturbed import (
    one_at_a_time as one_at_a_time,  # Have one thread at a time run a function of all that are marked so, which may call one another; others wait
)
from ._undisturbed import (
    seed_of as seed_of,  # A seed of its own for each place, of 32 bits, which is what torch takes of one
)
from ._undisturbed import (
    without_collections as without_collections,  # Have Python's collector of cyclic garbage wait while many small objects are made that stay
)
from ._warn import (
    quiet as quiet,  # Exporters log what the library itself reports; errors still arrive as exceptions
)
from ._warn import (
    warn as warn,  # Warn as of the first line outside of the library that led here
)
from .compat import (
    PRESERVED as PRESERVED,  # torch: key under which graph modules keep attributes of the caller's
)
from .compat import (
    RECURRENT_LISTS as RECURRENT_LISTS,  # lists of their own parameters that recurrent modules make anew as they run
)
from .compat import (
    SET_GRAD as SET_GRAD,  # the function that a graph of dynamo's calls where gradients are switched on or off
)
from .compat import (
    SIZE_FUNCTIONS as SIZE_FUNCTIONS,  # what an expression of sizes is made of, by name
)
from .compat import (
    DataDependentOutputException as DataDependentOutputException,  # torch: raised where a stand-in would need values
)
from .compat import (
    DynamicOutputShapeException as DynamicOutputShapeException,  # torch: raised where a shape depends on values
)
from .compat import (
    FakeTensor as FakeTensor,  # torch: a tensor without values, with type, shape and layout
)
from .compat import (
    FakeTensorMode as FakeTensorMode,  # torch: operators inside return tensors without values
)
from .compat import (
    HigherOrderOperator as HigherOrderOperator,  # torch: an operator that takes graphs
)
from .compat import (
    InstructionTranslator as InstructionTranslator,  # torch: dynamo's reader of the code that is compiled
)
from .compat import (
    LazyGraphModule as LazyGraphModule,  # torch: a graph module that compiles when it is called
)
from .compat import (
    OpOverload as OpOverload,  # torch: one overload of an operator
)
from .compat import (
    PyTreeCodeGen as PyTreeCodeGen,  # torch: writes a graph's forward with the caller's signature
)
from .compat import (
    PyTreeInfo as PyTreeInfo,  # torch: the caller's signature, for PyTreeCodeGen
)
from .compat import (
    ShapeEnv as ShapeEnv,  # torch: what is known of the sizes of a program
)
from .compat import (
    Symbols as Symbols,  # The symbolic sizes of a program that is put together of what was saved of it
)
from .compat import (
    TorchDispatchMode as TorchDispatchMode,  # torch: is told of every operator that runs
)
from .compat import (
    TracingContext as TracingContext,  # torch: what dynamo knows of the compilation under way
)
from .compat import (
    annotated_nodes as annotated_nodes,  # torch: keeps what annotate() said of nodes through a trace
)
from .compat import (
    annotating as annotating,  # torch: says something of the nodes that are traced inside
)
from .compat import (
    aot_export_module as aot_export_module,  # torch: a module as a functional graph of core operators
)
from .compat import (
    applied_functions as applied_functions,  # Tell a function of each class with a derivative of its own that is applied
)
from .compat import (
    asserted as asserted,  # What a program asserts of sizes that only a run tells
)
from .compat import (
    assign_attr as assign_attr,  # torch: sets an attribute of a graph module, by a dotted name
)
from .compat import (
    attributes_read as attributes_read,  # Tell a function of each attribute of a module that is read
)
from .compat import (
    bounds_of as bounds_of,  # The smallest and the largest size that a capture takes a symbol to have, where there are such
)
from .compat import (
    called_as as called_as,  # Have a model compute what a function does, for a while
)
from .compat import (
    codegen_of as codegen_of,  # What writes the code of a graph and knows how its inputs and outputs are nested
)
from .compat import (
    compile_graphs as compile_graphs,  # Compile what waits for its first call in a module, whose forward has no signature before
)
from .compat import (
    compiled_when_called as compiled_when_called,  # Let what is traced compile its graph when it is first called
)
from .compat import (
    conditions_on as conditions_on,  # What a capture took for true of its sizes
)
from .compat import (
    count_assumptions as count_assumptions,  # How many conditions and settled symbols there are: more, once anything new was assumed
)
from .compat import (
    decomposed_matmul as decomposed_matmul,  # torch: matmul in products of matrices
)
from .compat import (
    decomposition_table as decomposition_table,  # torch: how operators are made of others
)
from .compat import (
    enable_python_dispatcher as enable_python_dispatcher,  # torch: lets decompositions in Python run before kernels
)
from .compat import (
    forward_from_src as forward_from_src,  # torch: a forward function of its source
)
from .compat import (
    forward_pre_hooks as forward_pre_hooks,  # The hooks that a module calls before its forward, by number, to be read and changed
)
from .compat import (
    free_unbacked_symbols as free_unbacked_symbols,  # torch: the sizes in an expression that only data decide
)
from .compat import (
    guards_of as guards_of,  # What a program assumes of the sizes of its inputs, in Python
)
from .compat import (
    guards_of_module as guards_of_module,  # The module that checks the sizes of a call of an exported program's module
)
from .compat import (
    hint_of as hint_of,  # The size that a symbol stands for in the example; None where only a run tells
)
from .compat import (
    hooks_of as hooks_of,  # The hooks of a module itself, before and after its forward and on the way back
)
from .compat import (
    is_composite as is_composite,  # Whether an operator is made of others, so that its schema need not say that it returns a view
)
from .compat import (
    is_transform as is_transform,  # Whether a call of a graph is a step of a transformation of torch.func (vmap, grad)
)
from .compat import (
    is_view as is_view,  # Whether a tensor shows a part of another one to autograd
)
from .compat import (
    lookup_backend as lookup_backend,  # torch: a compiler of torch.compile, by its name
)
from .compat import (
    non_persistent_buffers as non_persistent_buffers,  # The names of a module's own buffers that its state dict leaves out, to be read and changed
)
from .compat import (
    pytree as pytree,  # torch: nested containers as leaves and a structure
)
from .compat import (
    ranges_of as ranges_of,  # The smallest and the largest size that a program takes each symbol to have
)
from .compat import (
    reading_gguf as reading_gguf,  # Have transformers read a GGUF file once, which takes seconds, and list the names of its tensors once
)
from .compat import (
    refuse_new_guards as refuse_new_guards,  # Raise where anything new would be assumed of the sizes
)
from .compat import (
    rename as rename,  # Give a node of a graph another name, with a number behind it where a node has that already
)
from .compat import (
    schema_of as schema_of,  # The schema of an operator: its arguments, what it writes into, and what it returns
)
from .compat import (
    set_guards as set_guards,  # Put another module in the place of the one that checks sizes
)
from .compat import (
    settle as settle,  # says of sizes what has to be true, or raises a RuntimeError; what data decide, a program asserts
)
from .compat import (
    settled_by as settled_by,  # The line of Python, in a model or in torch, that settled what a size is, if one did
)
from .compat import (
    silent_fake_tensors as silent_fake_tensors,  # Keep fake tensors from logging as an error what they go on to raise
)
from .compat import (
    take_guards as take_guards,  # Give a program guards on the sizes of its inputs, in Python
)
from .compat import (
    traced_by as traced_by,  # Let exporters find what operators return by functions of ours, and without torch's cache of what fake tensors became
)
from .compat import (
    tracing as tracing,  # torch: the context in which dynamo compiles
)
from .compat import (
    trees_of as trees_of,  # The structures of the inputs and the outputs of a graph module whose code takes them apart
)
from .compat import (
    version_of as version_of,  # How often a tensor was written into; None where torch does not count
)
from .compat import (
    with_parts as with_parts,  # A copy of an exported program with some of its parts others
)
from .compat import (
    without_overrides as without_overrides,  # calls of operators inside are not intercepted by __torch_function__, that of a mode included
)
from .compat import (
    without_stack_traces as without_stack_traces,  # Let what is traced not look for the line of the model that made each node
)
from .compat import (
    written_by_hook as written_by_hook,  # The attributes that a hook of torch.nn.utils sets
)
from .compat._transformers import (
    CACHE as CACHE,  # the name of the argument and of the output that holds keys and values of the tokens seen; until 5.23 it was a longer one
)
from .compat._transformers import (
    attention_of as attention_of,  # The implementation of attention that a configuration asks for, where it asks for one
)
from .compat._transformers import (
    classes_by_config as classes_by_config,  # The classes of models that an Auto class loads, by those of their configurations
)
from .compat._transformers import (
    export_program as export_program,  # The program of a model by the exporter of transformers
)
from .compat._transformers import (
    forget_conversions as forget_conversions,  # Let a model be saved under the names that its parameters have
)
from .compat._transformers import (
    get_auto_dynamic_shapes as get_auto_dynamic_shapes,  # transformers: which sizes of a model's arguments vary
)
from .compat._transformers import (
    is_cache_class as is_cache_class,  # transformers: whether a class holds keys and values
)
from .compat._transformers import (
    kept_in_float32 as kept_in_float32,  # Parts of the names of weights that transformers may keep in float32, whatever the model's type
)
from .compat._transformers import (
    mark_as_given as mark_as_given,  # Say of a cache that the caller brought it, so that generate gives it back
)
from .compat._transformers import (
    prepare_for_export as prepare_for_export,  # transformers: puts a model's attention into a form that exporters take
)
from .compat._transformers import (
    quiet_transformers as quiet_transformers,  # Keep transformers from remarking on configs that are only tried, and from drawing bars
)
from .compat._transformers import (
    register_cache_pytrees_for_model as register_cache_pytrees_for_model,  # transformers: lets torch take the caches of a model apart
)
from .compat._transformers import (
    register_pytree_node as register_pytree_node,  # transformers: lets torch take a class apart
)

__version__: str

__all__: list[str] = []
