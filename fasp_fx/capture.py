"""Capture a model as a functional graph in which linear, attention and norms stay whole."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._decomp import decomposition_table
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, TensorArgument
from torch.export.passes import move_to_device_pass
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo

from ._program import Program, graph_module
from ._recurrent import single_layers
from ._signature import CallerCodeGen, CallSignature, is_plain
from ._stamps import read_stamps
from .channels import results
from .errors import ArgumentError, CaptureError, first_line
from .patterns import lookup

_log = logging.getLogger("fasp_fx")


def capture(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    state: tuple[str, ...] = (),
    device: torch.device | str | None = None,
    image_sizes: bool = False,
) -> Program:
    """Capture ``model`` as it behaves on the example inputs.

    Args:
        model: a module in evaluation mode, a graph module, or an exported program.
        args, kwargs: example inputs; an exported program brings its own.
        dynamic_shapes: as for ``torch.export.export``; ``None`` keeps every dimension dynamic that the model lets vary, of images (floating-point
            tensors of four dimensions and more) only the first.
        state: names of arguments and outputs that hold state (a cache) and may become narrower.
        device: move the captured copy there; ``None`` leaves it where the model is.
        image_sizes: let heights and widths of images vary as well.

    Raises:
        ArgumentError: the inputs do not fit the model.
        CaptureError: the model is in training mode or cannot be exported; the message carries the exporter's reason.
    """
    kwargs = dict(kwargs or {})
    target = None if device is None else _usable(device)
    no_notes: tuple[str, ...] = ()
    if isinstance(model, ExportedProgram):
        exported, signature, notes = _functional(model), _exported_signature(model, args, kwargs), no_notes
    elif isinstance(model, nn.Module):
        training = next(_in_training(model), None)
        if training is not None:
            part = f"'{training}' of {type(model).__name__}" if training else type(model).__name__
            raise CaptureError(f"{part} is in training mode, which the capture would make permanent; call model.eval() first")
        args = args if isinstance(args, tuple) else (args,)
        if _is_transformers(model):
            _register_caches(model)
        signature = CallSignature.of(model.forward, args, kwargs)
        given = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, signature.graph_inputs(args, kwargs))
        exported, notes = _export(model, signature, given, dynamic_shapes, _every_dim if image_sizes else _all_dims, len(args))
    else:
        raise ArgumentError(f"model must be an nn.Module, fx.GraphModule or ExportedProgram, not {type(model).__name__}")
    if target is not None:
        exported = move_to_device_pass(exported, target)
    module = exported.module(check_guards=False)
    single_layers(module.graph)
    example = exported.example_inputs
    if example is None:
        raise ArgumentError("the exported program carries no example inputs; pass them as args and kwargs")
    inputs, outputs = _state_positions(module, exported, example, state)
    return Program(_plain(module), signature, example, inputs, outputs, notes=notes, order=_order(model))


def _order(model: nn.Module | ExportedProgram) -> tuple[str, ...]:
    if isinstance(model, ExportedProgram):
        return tuple(model.state_dict)
    return tuple(name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _usable(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ArgumentError(f"device={device!r} cannot be used here: {first_line(error)}; leave it out to stay on the model's device") from error
    return found


def _in_training(module: nn.Module, path: str = "") -> Iterator[str]:
    """Names of the submodules in training mode; graphs were captured in one mode and have no other."""
    if isinstance(module, fx.GraphModule):
        return
    if module.training:
        yield path
    for name, child in module.named_children():
        yield from _in_training(child, f"{path}.{name}" if path else name)


def _plain(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph module without export's refusal of train() and eval() and without its hooks."""
    return graph_module(module, module.graph, module.meta)


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """Functionalise, and decompose composite operators without a rule; most programs are exported functional and keep as they are."""
    if all(_is_plain(node) for node in exported.graph.nodes):
        return exported
    table = _decompositions(exported.graph)
    with _quiet():
        if table:
            try:
                return exported.run_decompositions(table)
            except (AssertionError, RuntimeError) as error:  # a decomposition need not be functional, or take symbolic sizes
                _log.info("some operators without a rule stay whole: %s", error)
        return exported.run_decompositions({})


#: composites that stay whole though they have no rule: taken apart, they would fix the length of their input
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def _decompositions(graph: fx.Graph) -> dict[OpOverload, Callable[..., Any]]:
    """How to take apart the operators of a graph that have no rule: what they are made of may have one."""
    known = torch.export.default_decompositions()
    found: dict[OpOverload, Callable[..., Any]] = {}
    for operator in {node.target for node in graph.nodes if isinstance(node.target, OpOverload) and not _is_plain(node)}:
        if operator._schema.is_mutable or operator._schema.name.rpartition("::")[2] in _RECURRENT:
            continue
        if operator in known:
            found[operator] = known[operator]
        elif operator in decomposition_table:
            found[operator] = decomposition_table[operator]
    return found


def _is_plain(node: fx.Node) -> bool:
    if node.op != "call_function":
        return node.op != "get_attr"  # a submodule: a region with its own gradient or autocast mode
    if not isinstance(node.target, OpOverload):
        return not isinstance(node.target, HigherOrderOperator)
    if node.target._schema.is_mutable:
        return False
    # what computes positions and indices of nothing, or of one another, touches no channel: it may stay whole without a rule
    given = [argument.meta.get("val") for argument in node.all_input_nodes]
    return lookup(node.target) is not None or not any(isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) for value in given)


def _exported_signature(exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSignature:
    if exported.example_inputs is None:
        raise ArgumentError("the exported program carries no example inputs; export it again from its model")
    example_args, example_kwargs = exported.example_inputs
    forward = exported.module(check_guards=False).forward
    return CallSignature.of(forward, args or example_args, kwargs or example_kwargs)


def _export(
    model: nn.Module, signature: CallSignature, given: dict[str, Any], dynamic_shapes: Any, free: Any, leading: int
) -> tuple[ExportedProgram, tuple[str, ...]]:
    names = _by_position(model, signature, leading)
    meta = any(parameter.device.type == "meta" for parameter in model.parameters())
    if meta:
        given = pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, given)
    attempts: list[tuple[str, dict[str, Any], Any]] = []
    if dynamic_shapes is not None:
        attempts.append(("", given, dynamic_shapes))
    else:
        wide = _widened(given)
        if wide is not None:
            attempts.append(("", wide, free))
        attempts.append(("the batch size of 1 seen at capture is fixed" if wide is not None else "", given, free))
        attempts.append(("only the first dimension of each input is dynamic", wide or given, _first_dim))
        attempts.append(("the shapes of the inputs are fixed to those of the example", given, None))
    failures: list[Exception] = []
    for note, inputs, shapes in attempts:
        try:
            with _quiet(), _without_grad():
                exported = _export_once(model, signature, names, inputs, shapes)
                features = _of_fixed_total(exported) if dynamic_shapes is None and callable(shapes) else frozenset()
                if features:
                    exported = _export_once(model, signature, names, inputs, functools.partial(_with_static, shapes, features))
            if dynamic_shapes is None and shapes is _all_dims and _images(inputs.values()):
                note = "; ".join(filter(None, (note, "the sizes of images are fixed to those of the example; dynamic_shapes= lets them vary")))
            return exported, ((note,) if note else ())
        except Exception as error:
            failures.append(error)
    reason = str(failures[0]).strip().splitlines() or [type(failures[0]).__name__]
    raise CaptureError(
        f"{type(model).__name__} cannot be captured by torch.export: {reason[0]}. Try the inputs on the model itself, "
        "then capture the largest submodule without data-dependent control flow."
    ) from failures[0]


def _by_position(model: nn.Module, signature: CallSignature, leading: int) -> list[str]:
    """The arguments to pass by position: those that must be, those that an exported module has fixed there, and the ``leading`` ones given so."""
    codegen = model.graph._codegen if isinstance(model, fx.GraphModule) else None
    if isinstance(codegen, _PyTreeCodeGen) and not isinstance(codegen, CallerCodeGen):
        return signature.given()[: codegen.pytree_info.in_spec.child(0).num_children]
    must = signature.by_position()
    if _is_transformers(model):
        return must  # its exporter takes keywords
    first = list(itertools.takewhile(lambda name: name not in signature.constants or is_plain(signature.constants[name]), signature.given()[:leading]))
    return max(must, first, key=len)


def _export_once(model: nn.Module, signature: CallSignature, names: list[str], inputs: dict[str, Any], shapes: Any) -> ExportedProgram:
    args = tuple(inputs[name] if name in inputs else signature.constants[name] for name in names)
    kwargs = {name: value for name, value in inputs.items() if name not in names}
    if _is_transformers(model) and not args:
        return _functional(_export_transformers(model, {**kwargs, **signature.constants}, shapes))
    constants = {name: value for name, value in signature.constants.items() if name not in names}
    kwargs |= {name: value for name, value in constants.items() if is_plain(value)}
    with _holding(model, {name: value for name, value in constants.items() if not is_plain(value)}):
        spec = shapes(args, kwargs).dynamic_shapes(model, args, kwargs) if callable(shapes) else shapes
        return _functional(torch.export.export(model, args, kwargs, dynamic_shapes=spec, strict=False))


@contextlib.contextmanager
def _holding(model: nn.Module, constants: dict[str, Any]) -> Iterator[None]:
    """Give ``forward`` arguments that the exporter does not take, such as members of an enum."""
    if not constants:
        yield
        return
    own = vars(model).get("forward")
    model.forward = functools.partial(model.forward, **constants)
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _is_transformers(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _register_caches(model: Any) -> None:
    """Make torch see the tensors inside caches before arguments are told from constants; the exporter does so only later."""
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

    register_cache_pytrees_for_model(model)


def _export_transformers(model: Any, kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
    from transformers.exporters.utils import prepare_for_export

    model, prepared, flags = prepare_for_export(model, dict(kwargs))  # so that the shapes speak of what the exporter will see
    kwargs = dict(prepared)
    if shapes is _every_dim or (shapes is _all_dims and not _images(kwargs.values())):
        shapes = _cached_dims(kwargs)
    elif callable(shapes):
        shapes = shapes((), kwargs).dynamic_shapes(model, (), kwargs)
    config = DynamoConfig(dynamic=shapes is not None, dynamic_shapes=shapes)
    own = vars(model).get("forward")
    try:
        exported, _ = DynamoExporter().export_program(model, {**kwargs, **flags}, config)
    finally:
        if own is None:
            vars(model).pop("forward", None)  # the exporter puts the method back as an attribute
    return exported


def _cached_dims(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every dimension dynamic, but in caches the number of heads and the width: a size that varies between calls is no channel that could go."""
    from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes

    found = {}
    for name, value in kwargs.items():
        found[name] = get_auto_dynamic_shapes(value)
        if _is_cache(type(value)):
            found[name] = [_cache_dims(leaf) if isinstance(leaf, Tensor) else spec for leaf, spec in zip(pytree.tree_leaves(value), found[name], strict=True)]
    return found


def _cache_dims(tensor: Tensor) -> dict[int, Any]:
    fixed = {tensor.dim() - 1} | ({1} if tensor.dim() == 4 else set())  # [batch, heads, length, width], or states without a length
    return {dim: Dim.STATIC if dim in fixed and tensor.dim() > 1 else Dim.AUTO for dim in range(tensor.dim())}


def _widened(given: dict[str, Any]) -> dict[str, Any] | None:
    """Inputs of batch size 1 doubled, since the exporter takes a size of 1 for a constant."""
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    if not all(tensor.dim() and tensor.shape[0] == 1 for tensor in tensors):
        return None
    return pytree.tree_map(lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf, given)


def _images(arguments: Iterable[Any]) -> set[int]:
    """The arguments that are images or films, by identity: floating-point tensors of four dimensions and more, as wide as no tensor of integers is long.

    They vary in number only: conditions on every height and width can take an exporter minutes to simplify. A mask over tokens is as wide as they are
    many; a cache is no argument by itself.
    """
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    lengths = {size for tensor in tensors if not tensor.is_floating_point() for size in tensor.shape}
    return {id(tensor) for tensor in tensors if tensor.is_floating_point() and tensor.dim() >= 4 and tensor.shape[-1] not in lengths}


def _collection(args: tuple[Any, ...], kwargs: dict[str, Any], dims: int | None, images: set[int]) -> ShapesCollection:
    collection = ShapesCollection()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            count = leaf.dim() if dims is None else min(dims, leaf.dim())
            count = min(count, 1) if id(leaf) in images else count
            collection[leaf] = {dim: Dim.AUTO if dim < count else Dim.STATIC for dim in range(leaf.dim())}
    return collection


def _all_dims(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShapesCollection:
    return _collection(args, kwargs, None, _images((*args, *kwargs.values())))


def _every_dim(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShapesCollection:
    return _collection(args, kwargs, None, set())


def _first_dim(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShapesCollection:
    return _collection(args, kwargs, 1, set())


def _of_fixed_total(exported: ExportedProgram) -> frozenset[tuple[int, int]]:
    """Dimensions of inputs, as (position, dimension), whose sizes may vary only against each other because their sum is fixed.

    These are features side by side, not batches or lengths: where one ends decides which weights meet the next.
    """
    given = [spec.arg for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    recorded = {node.name: node.meta["val"].shape for node in exported.graph.find_nodes(op="placeholder") if isinstance(node.meta.get("val"), Tensor)}
    sizes = {
        (index, dim): size.node.expr
        for index, argument in enumerate(given)
        if isinstance(argument, TensorArgument)
        for dim, size in enumerate(recorded[argument.name])
        if isinstance(size, torch.SymInt)
    }
    tied: set[Any] = set()
    for expression in sizes.values():
        constant, rest = expression.as_coeff_Add()
        if constant > 0 and rest and all(part.as_coeff_Mul()[0] < 0 for part in sympy.Add.make_args(rest)):
            tied |= expression.free_symbols
    return frozenset(place for place, expression in sizes.items() if expression.free_symbols & tied)


def _with_static(
    shapes: Callable[..., ShapesCollection], fixed: frozenset[tuple[int, int]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ShapesCollection:
    """What ``shapes`` lets vary, but for these dimensions."""
    collection = shapes(args, kwargs)
    for index, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
        for dim in [dim for position, dim in fixed if position == index]:
            collection[leaf][dim] = Dim.STATIC
    return collection


def upper_bound(size: torch.SymInt) -> int | None:
    """The largest value that the capture allows for a dynamic size, or ``None`` if there is no limit."""
    expression, environment = size.node.expr, size.node.shape_env
    bounds = environment.var_to_range.get(expression) if expression.is_Symbol else None
    if bounds is None or bounds.upper in (int_oo, sympy.oo):
        return None
    return int(bounds.upper) if int(bounds.upper) < torch.iinfo(torch.int32).max else None


def recorded_shapes(module: fx.GraphModule, example: tuple[tuple[Any, ...], dict[str, Any]]) -> ShapesCollection:
    """The dynamic dimensions of a captured program and their ranges, to export it again with the same freedom."""
    collection = ShapesCollection()
    leaves = pytree.tree_leaves(example)
    for node, leaf in zip(module.graph.find_nodes(op="placeholder"), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            continue
        spec: dict[int, Any] = {}
        for dim, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None:  # a symbol that the capture settled is one still
                spec[dim] = Dim.STATIC
                continue
            spec[dim] = Dim.AUTO
            upper = upper_bound(size)
            if upper is not None:
                spec[dim] = Dim.AUTO(max=upper)
        collection[leaf] = spec
    return collection


def export_again(module: fx.GraphModule, example: tuple[tuple[Any, ...], dict[str, Any]]) -> ExportedProgram:
    """Export a rewritten graph module; guards, ranges and recorded shapes are made anew."""
    args, kwargs = example
    shapes = recorded_shapes(module, example).dynamic_shapes(module, args, kwargs)
    with _quiet(), _without_grad():
        return _functional(torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False))


def is_plain_graph(graph: fx.Graph) -> bool:
    """Whether a graph with its weights as attributes has no calls but of operators and what an exporter leaves beside them."""
    return all(node.op in ("placeholder", "output", "get_attr") or (node.op == "call_function" and _is_exported(node.target)) for node in graph.nodes)


def _is_exported(target: Any) -> bool:
    """Operators, and what takes their items or computes with sizes."""
    if isinstance(target, (OpOverload, HigherOrderOperator)):
        return True
    return getattr(target, "__module__", None) in ("_operator", "math") or getattr(target, "__name__", "").startswith("sym_")


def recapture(program: Program, exported: ExportedProgram) -> Program:
    """The same model after ``exported`` was made of it; inputs keep their names, weights are known by theirs.

    Raises:
        CaptureError: the exported program is not called as the model is.
    """
    exported = _functional(exported)
    read_stamps(exported.graph)
    module = _plain(exported.module(check_guards=False))
    single_layers(module.graph)
    inputs, before = module.graph.find_nodes(op="placeholder"), program.placeholders()
    if len(inputs) != len(before) or len(results(module.graph)) != len(results(program.module.graph)):
        raise CaptureError("it changed the number of the program's inputs or outputs")
    for node, old in zip(inputs, before, strict=True):
        if node.name != old.name:
            node._rename(old.name)
    module.recompile()
    return replace(program, module=module)


# --- state


def _is_cache(kind: Any) -> bool:
    from transformers import Cache

    return inspect.isclass(kind) and issubclass(kind, Cache)


def _leaves_in_state(spec: pytree.TreeSpec, state: tuple[str, ...], inside: bool = False) -> Iterator[bool]:
    if spec.is_leaf():
        yield inside
        return
    names = spec.context if isinstance(spec.context, (list, tuple)) and len(spec.context) == spec.num_children else [None] * spec.num_children
    for index, name in enumerate(names):
        yield from _leaves_in_state(spec.child(index), state, inside or _is_cache(spec.type) or (isinstance(name, str) and name in state))


def _state_positions(
    module: fx.GraphModule, exported: ExportedProgram, example: tuple[tuple[Any, ...], dict[str, Any]], state: tuple[str, ...]
) -> tuple[frozenset[str], frozenset[int]]:
    inputs = list(_leaves_in_state(exported.call_spec.in_spec, state))
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    outputs = list(_leaves_in_state(exported.call_spec.out_spec, state))
    return (
        frozenset(name for name, held in zip(names, inputs, strict=False) if held),
        frozenset(index for index, held in enumerate(outputs) if held),
    )


# --- surroundings


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters log what the library itself reports; errors still arrive as exceptions."""
    from transformers.exporters import exporter_dynamo

    names = (
        "torch.export",
        "torch._export",
        "torch.fx.experimental.symbolic_shapes",
        "torch._export.non_strict_utils",
        "transformers",
        exporter_dynamo.logger.name,
    )
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _without_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
