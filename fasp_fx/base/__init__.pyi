from ._atomic import (
    new_file as new_file,  # Give a temporary sibling of path to write; it takes the name path when the block ends
    new_folder as new_folder,  # Give a temporary sibling of path to fill; it takes the name path when the block ends
    write_text as write_text,  # Put text in the place of what a file holds, whole or not at all
)
from ._compare import (
    built_alike as built_alike,  # Whether two containers, or what else is registered as such, are built alike of parts that are the same
    deviation as deviation,  # max|a − b| / max|b| of two outputs, of fillings by themselves; infinite where they cannot be compared
    distance as distance,  # ‖a − b‖₂ / ‖b‖₂, as lengths_apart has them; infinite where shapes differ
    largest_passing_subset as largest_passing_subset,  # A part of items without fault that no other item can join
    lengths_apart as lengths_apart,  # ‖a − b‖₂ and ‖b‖₂ of two tensors of real numbers of one shape
    tolerance as tolerance,  # How far apart values of a type may be (TOLERANCE); 0 for integers
    unfilled as unfilled,  # The values where what is expected is neither infinite nor a filling, flat if any is
)
from ._offload import (
    Scratch as Scratch,  # Files in a folder that hold tensors, and have no name there: what no tensor uses is freed, whatever becomes of the process
    addresses as addresses,  # Where the memory of tensors lies that keep_values would move
    computing as computing,  # Where calibration batches run while their model lies in files, if that is not the CPU
    keep as keep,  # A tensor as large as a weight that will be needed later: in a file inside of fasp_fx.offload, as it is elsewhere
    keep_values as keep_values,  # The same values, with their memory in files inside of fasp_fx.offload
    keep_weights as keep_weights,  # Put the parameters and buffers of a model into files
    moved as moved,  # The same values on another device
    offload as offload,  # Keep weights in files while a model is pruned: those that are made inside, and those given to keep_weights
    zeros as zeros,  # Zeros that will be needed later, kept as keep does
)
from ._page import (
    Page as Page,  # Shows itself in a notebook as the page that fasp_fx.to_html makes of it
)
from ._progress import (
    Shown as Shown,  # what progress= takes: a function that is called with the fraction done; None: a bar in a terminal or a notebook
    advance_of as advance_of,  # The function to call with the fraction done
    bar_on as bar_on,  # A bar with the time that remains, which goes when the work is done; none in a file or a pipe
    between as between,  # The progress of a step, as a part of that of all
    process as process,  # What torchrun says of this process: RANK, LOCAL_RANK or WORLD_SIZE
    shows as shows,  # Have a function be given a function as progress, whatever its caller gives (Shown)
)
from ._records import (
    Count as Count,  # a number of things, or an index, as large as a size of a tensor can be
    Options as Options,  # What a configuration is: a frozen dataclass of options, which checks itself
    ReadBy as ReadBy,  # Annotates a field whose value is made by a function of what JSON holds, whatever its type
    check_callable as check_callable,  # Refuse arguments that are to be called and cannot be
    check_kind as check_kind,  # Refuse an argument that is of another kind
    from_document as from_document,  # What a document of that kind holds
    is_number as is_number,  # Whether a value is a finite number that a float can hold, and no truth value
    names_of as names_of,  # The names that an option was given, as a tuple
    parse as parse,  # What a text of JSON holds; fields that are not known are left out
    path_of as path_of,  # A path that an argument gives
    to_document as to_document,  # A document of its own, which from_document reads
)
from ._tensors import (
    check_device as check_device,  # The device of a name, if it can be used
    dense as dense,  # A tensor with the same values, dense and not quantised; itself where it is so
    device_named as device_named,  # The device of a name; that of the CPU has no number, as tensors there say it
    device_of as device_of,  # The device of a model's weights
    digest_of as digest_of,  # What tells calibration data from others: types, shapes and values
    fingerprint as fingerprint,  # A digest of names, shapes and all values, the same on any device; of tensors without values
    laid_otherwise as laid_otherwise,  # A copy that lies so
    lying_otherwise as lying_otherwise,  # A tensor of the same shape and type, without its values
    multiplies_bfloat16 as multiplies_bfloat16,  # Whether a device multiplies matrices of bfloat16 in hardware
    storage_of as storage_of,  # What tells whether two tensors share memory, also where they hold no values; for anything else
    tensors_in as tensors_in,  # The tensors among arguments or outputs, however these are nested
    with_values as with_values,  # A parameter, or what is none, that holds other values
    without_values as without_values,  # A tensor of the same kind on the meta device
)
from ._tolerable import (
    short_of_memory as short_of_memory,  # What to catch where smaller pieces may fit: anything, if memory is short, the host's or a device's
    tolerable as tolerable,  # The kinds of exceptions to catch where one is taken for "this did not work"
)
from ._undisturbed import (
    drawing_alike as drawing_alike,  # Random numbers that a model draws (dropout that is always on, say) start from a seed inside
    float32_products as float32_products,  # Within it, products of float32 have a precision by torch.set_float32_matmul_precision
    for_a_while as for_a_while,  # Put back what is changed inside of a state of the whole process
    generator_of as generator_of,  # Random numbers of their own for each place, on the CPU; arguments as for seed_of
    in_usual_modes as in_usual_modes,  # Have a function run outside of the caller's inference mode, no_grad and autocast
    one_at_a_time as one_at_a_time,  # Have one thread at a time run a function of all that are marked so, which may call one another; others wait
    products_in_bfloat16 as products_in_bfloat16,  # Within it, products are computed in bfloat16 by autocast, if wanted
    seed_of as seed_of,  # A seed of its own for each place, of 32 bits, which is what torch takes of one
    without_collections as without_collections,  # Have Python's collector of cyclic garbage wait while many small objects are made that stay
)
from ._warn import (
    quiet as quiet,  # Exporters log what the library itself reports; errors still arrive as exceptions
    warn as warn,  # Warn as of the first line outside of the library that led here
)
from .compat import (
    PRESERVED as PRESERVED,  # torch: key under which graph modules keep attributes of the caller's
    RECURRENT_LISTS as RECURRENT_LISTS,  # lists of their own parameters that recurrent modules make anew as they run
    SET_GRAD as SET_GRAD,  # the function that a graph of dynamo's calls where gradients are switched on or off
    SIZE_FUNCTIONS as SIZE_FUNCTIONS,  # what an expression of sizes is made of, by name
    DataDependentOutputException as DataDependentOutputException,  # torch: raised where a stand-in would need values
    DynamicOutputShapeException as DynamicOutputShapeException,  # torch: raised where a shape depends on values
    FakeTensor as FakeTensor,  # torch: a tensor without values, with type, shape and layout
    FakeTensorMode as FakeTensorMode,  # torch: operators inside return tensors without values
    HigherOrderOperator as HigherOrderOperator,  # torch: an operator that takes graphs
    InstructionTranslator as InstructionTranslator,  # torch: dynamo's reader of the code that is compiled
    LazyGraphModule as LazyGraphModule,  # torch: a graph module that compiles when it is called
    OpOverload as OpOverload,  # torch: one overload of an operator
    PyTreeCodeGen as PyTreeCodeGen,  # torch: writes a graph's forward with the caller's signature
    PyTreeInfo as PyTreeInfo,  # torch: the caller's signature, for PyTreeCodeGen
    ShapeEnv as ShapeEnv,  # torch: what is known of the sizes of a program
    Symbols as Symbols,  # The symbolic sizes of a program that is put together of what was saved of it
    TorchDispatchMode as TorchDispatchMode,  # torch: is told of every operator that runs
    TracingContext as TracingContext,  # torch: what dynamo knows of the compilation under way
    annotated_nodes as annotated_nodes,  # torch: keeps what annotate() said of nodes through a trace
    annotating as annotating,  # torch: says something of the nodes that are traced inside
    aot_export_module as aot_export_module,  # torch: a module as a functional graph of core operators
    applied_functions as applied_functions,  # The names of the functions with a derivative of their own that are applied meanwhile, but for torch's
    asserted as asserted,  # What a program asserts of sizes that only a run tells
    assign_attr as assign_attr,  # torch: sets an attribute of a graph module, by a dotted name
    attributes_read as attributes_read,  # Tell a function of each attribute of a module that is read
    bounds_of as bounds_of,  # The smallest and the largest size that a capture takes a symbol to have, where there are such
    called_as as called_as,  # Have a model compute what a function does, for a while
    codegen_of as codegen_of,  # What writes the code of a graph and knows how its inputs and outputs are nested
    compile_graphs as compile_graphs,  # Compile what waits for its first call in a module, whose forward has no signature before
    compiled_when_called as compiled_when_called,  # Let what is traced compile its graph when it is first called
    conditions_on as conditions_on,  # What a capture took for true of its sizes
    count_assumptions as count_assumptions,  # How many conditions and settled symbols there are: more, once anything new was assumed
    decomposed_matmul as decomposed_matmul,  # torch: matmul in products of matrices
    decomposition_table as decomposition_table,  # torch: how operators are made of others
    enable_python_dispatcher as enable_python_dispatcher,  # torch: lets decompositions in Python run before kernels
    forward_from_src as forward_from_src,  # torch: a forward function of its source
    forward_pre_hooks as forward_pre_hooks,  # The hooks that a module calls before its forward, by number, to be read and changed
    free_unbacked_symbols as free_unbacked_symbols,  # torch: the sizes in an expression that only data decide
    guards_of as guards_of,  # What a program assumes of the sizes of its inputs, in Python
    guards_of_module as guards_of_module,  # The module that checks the sizes of a call of an exported program's module
    hint_of as hint_of,  # The size that a symbol stands for in the example; None where only a run tells
    hooks_of as hooks_of,  # The hooks of a module itself, before and after its forward and on the way back
    is_composite as is_composite,  # Whether an operator is made of others, so that its schema need not say that it returns a view
    is_transform as is_transform,  # Whether a call of a graph is a step of a transformation of torch.func (vmap, grad)
    is_view as is_view,  # Whether a tensor shows a part of another one to autograd
    lookup_backend as lookup_backend,  # torch: a compiler of torch.compile, by its name
    non_persistent_buffers as non_persistent_buffers,  # The names of a module's own buffers that its state dict leaves out, to be read and changed
    pytree as pytree,  # torch: nested containers as leaves and a structure
    ranges_of as ranges_of,  # The smallest and the largest size that a program takes each symbol to have
    reading_gguf as reading_gguf,  # Have transformers read a GGUF file once, which takes seconds, and list the names of its tensors once
    refuse_new_guards as refuse_new_guards,  # Raise where anything new would be assumed of the sizes
    rename as rename,  # Give a node of a graph another name, with a number behind it where a node has that already
    schema_of as schema_of,  # The schema of an operator: its arguments, what it writes into, and what it returns
    set_guards as set_guards,  # Put another module in the place of the one that checks sizes
    settle as settle,  # says of sizes what has to be true, or raises a RuntimeError; what data decide, a program asserts
    settled_by as settled_by,  # The line of Python, in a model or in torch, that settled what a size is, if one did
    silent_fake_tensors as silent_fake_tensors,  # Keep fake tensors from logging as an error what they go on to raise
    take_guards as take_guards,  # Give a program guards on the sizes of its inputs, in Python
    traced_by as traced_by,  # Let exporters find what operators return by functions of ours, and without torch's cache of what fake tensors became
    tracing as tracing,  # torch: the context in which dynamo compiles
    trees_of as trees_of,  # The structures of the inputs and the outputs of a graph module whose code takes them apart
    version_of as version_of,  # How often a tensor was written into; None where torch does not count
    with_parts as with_parts,  # A copy of an exported program with some of its parts others
    without_overrides as without_overrides,  # calls of operators inside are not intercepted by __torch_function__, that of a mode included
    without_stack_traces as without_stack_traces,  # Let what is traced not look for the line of the model that made each node
    written_by_hook as written_by_hook,  # The attributes that a hook of torch.nn.utils sets
)
from .compat._transformers import (
    CACHE as CACHE,  # the name of the argument and of the output that holds keys and values of the tokens seen; until 5.23 it was a longer one
    attention_of as attention_of,  # The implementation of attention that a configuration asks for, where it asks for one
    classes_by_config as classes_by_config,  # The classes of models that an Auto class loads, by those of their configurations
    export_program as export_program,  # The program of a model by the exporter of transformers
    forget_conversions as forget_conversions,  # Let a model be saved under the names that its parameters have
    get_auto_dynamic_shapes as get_auto_dynamic_shapes,  # transformers: which sizes of a model's arguments vary
    is_cache_class as is_cache_class,  # transformers: whether a class holds keys and values
    kept_in_float32 as kept_in_float32,  # Parts of the names of weights that transformers may keep in float32, whatever the model's type
    mark_as_given as mark_as_given,  # Say of a cache that the caller brought it, so that generate gives it back
    prepare_for_export as prepare_for_export,  # transformers: puts a model's attention into a form that exporters take
    quiet_transformers as quiet_transformers,  # Keep transformers from remarking on configs that are only tried, and from drawing bars
    register_cache_pytrees_for_model as register_cache_pytrees_for_model,  # transformers: lets torch take the caches of a model apart
    register_pytree_node as register_pytree_node,  # transformers: lets torch take a class apart
)

__version__: str

__all__: list[str] = []
