"""What an exporter leaves in a graph, put right in the program's own graph, which nobody else may hold
meanwhile, or said of it.
"""

from __future__ import annotations

import copy
import keyword
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ..base._tensors import storage_of
from ..base.compat import settled_by
from ..errors import CaptureError
from ._fx import arguments

# --- Sizes that an exporter took to vary until the program said what they are: numbers, once it is known.
#
# A node that computes one reads it of an input, which is not pruned; a number is adapted to what is left.


#: the code of exporters and operators, where sizes are settled by what meets what
_OPERATORS = tuple(str(Path(str(file)).parent) for file in (torch.__file__, Path(__file__).parent))


def settled_as_numbers(exported: ExportedProgram) -> ExportedProgram:
    """Write such sizes as the numbers that they are, in the program's own graph, which nobody else may hold;
    those that the program returns stay.
    """
    found = {node: number for node in exported.graph.nodes if (number := _number(node)) is not None}
    for user in exported.graph.nodes:
        if user.op != "output" and not found.keys().isdisjoint(user.all_input_nodes):
            user.args, user.kwargs = fx.map_arg(
                (user.args, user.kwargs), lambda given: found.get(given, given)
            )
    for node in reversed(found):
        if not node.users:
            exported.graph.erase_node(node)
    if found:
        exported.graph_module.recompile()
    return exported


def _number(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.SymInt):
        return None
    number: int | None = value.node.maybe_as_int()
    return number


def fixed_sizes(exported: ExportedProgram) -> Iterator[str]:
    """What a user should know of sizes of the inputs that were to vary and do not.

    Features meet weights, in an operator; where forward asks for a number, the line that does so is known. A
    first dimension is that of samples, and spoken of whatever fixed it.
    """
    inputs = set(exported.graph_signature.user_inputs)
    for node in exported.graph.find_nodes(op="placeholder"):
        shape = node.meta["val"].shape if node.name in inputs and isinstance(node.meta["val"], Tensor) else ()
        for dim, size in enumerate(shape):
            number = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
            line = None if number is None else settled_by(size)
            if line is not None and not line.filename.startswith(_OPERATORS):
                why = f"forward asks for it as a number ({Path(line.filename).name}, line {line.lineno})"
            elif number is not None and dim == 0:
                why = "it is that of what it meets"
            elif size == 1 and dim == 0:
                why = "one is a constant to an exporter"
            else:
                continue
            yield f"the size {size} of dimension {dim} of '{node.name}' is fixed, because {why}"


# --- Composite operators without a rule that are one view, written as that.
#
# Taking composites apart traces a graph once more, and models call this one often.


_ATEN = torch.ops.aten


def as_views(exported: ExportedProgram) -> ExportedProgram:
    """Rewrite such calls in the program's own graph, which nobody else may hold."""
    if not exported.graph.find_nodes(op="call_function", target=_UNFLATTEN):
        return exported
    #: what makes the sizes that vary, of those nodes that were passed
    sizes: dict[Any, fx.Node | tuple[fx.Node, int]] = {}
    for node in exported.graph.nodes:
        if node.target == _UNFLATTEN:
            _as_view(node, sizes)
        _note(node, sizes)
    exported.graph_module.recompile()
    return exported


_UNFLATTEN = _ATEN.unflatten.int


def _note(node: fx.Node, sizes: dict[Any, fx.Node | tuple[fx.Node, int]]) -> None:
    """Note the sizes that a node makes; one of an input, which is looked up, gives way to a node."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        if isinstance(sizes.get(value.node.expr), (tuple, type(None))):
            sizes[value.node.expr] = node
    elif node.op == "placeholder" and isinstance(value, Tensor):
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                sizes.setdefault(size.node.expr, (node, dim))


def _as_view(node: fx.Node, sizes: dict[Any, fx.Node | tuple[fx.Node, int]]) -> None:
    """Let a call of ``unflatten`` be one of ``view``, where the sizes of the other dimensions are known.

    They are looked up where an exporter does, not of the tensor itself, of which they would be one more use.
    """
    given = arguments(node)
    source, parts = given["self"], list(given["sizes"])
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return
    dim = given["dim"] % before.dim()
    others = [size for other, size in enumerate(before.shape) if other != dim]
    if not all(isinstance(size, int) or size.node.expr in sizes for size in others):
        return
    parts = [
        made if isinstance(part, int) and isinstance(made, int) else part
        for part, made in zip(parts, after.shape[dim:])
    ]
    with node.graph.inserting_before(node):
        made = [_made(size, sizes) for size in others]
    node.target = _ATEN.view.default
    node.args, node.kwargs = (source, [*made[:dim], *parts, *made[dim:]]), {}


def _made(size: Any, sizes: dict[Any, fx.Node | tuple[fx.Node, int]]) -> Any:
    """A size as an argument."""
    if isinstance(size, int):
        return size
    found = sizes[size.node.expr]
    if isinstance(found, tuple):
        source, dim = found
        found = sizes[size.node.expr] = source.graph.call_function(_ATEN.sym_size.int, (source, dim))
        found.meta = {"val": size}
    return found


# --- Padding by an amount that varies, which may be none.
#
# Where there is nothing to pad, a kernel returns what lies in memory as its input does. A tracer takes
# the result to lie in order at every size, and settles by that which changes of shape are views.


_PADS = (_ATEN.pad.default, _ATEN.constant_pad_nd.default)
_COPY, _IN_ORDER = _ATEN.clone.default, {"memory_format": torch.contiguous_format}


def padded_in_order(exported: ExportedProgram) -> ExportedProgram:
    """Let what such calls return lie in order, in the program's own graph, which nobody else may hold."""
    found = [
        node
        for operator in _PADS
        for node in exported.graph.find_nodes(op="call_function", target=operator)
        if _varies(node) and not all(map(_is_in_order, node.users))
    ]
    for node in found:
        _put_in_order(node)
    if found:
        exported.graph_module.recompile()
    return exported


def _varies(node: fx.Node) -> bool:
    return any(isinstance(amount, fx.Node) for amount in arguments(node)["pad"])


def _is_in_order(node: fx.Node) -> bool:
    return node.target == _COPY and node.kwargs == _IN_ORDER


def _put_in_order(node: fx.Node) -> None:
    with node.graph.inserting_after(node):
        copy = node.graph.call_function(_COPY, (node,), dict(_IN_ORDER))
    copy.meta = dict(node.meta)
    # the program names its outputs
    node.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy and user.op != "output")
    if len(copy.users) == 0:
        node.graph.erase_node(copy)


# --- Constants of a program that are its parameters or buffers, reached by another way.
#
# What forward reads from a list or dict of its own is a constant to an exporter, also where it is a
# parameter of the model. As a constant it would keep its values while weights are trained or loaded.


def as_weights(exported: ExportedProgram) -> ExportedProgram:
    """A program that reads its parameters and buffers wherever it reads their memory; the same one if it does
    already.
    """
    held = {**exported.constants, **exported.state_dict}
    specs = exported.graph_signature.input_specs
    weights = {
        storage_of(held[str(spec.target)]): spec
        for spec in reversed(specs)  # the first of several
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
    }
    found = {
        spec.arg.name: (weights[memory], held[str(spec.target)])
        for spec in specs
        if spec.kind is InputKind.CONSTANT_TENSOR
        and (memory := storage_of(held[str(spec.target)])) in weights
        and _is_within(held[str(spec.target)], held[str(weights[memory].target)])
    }
    if not found:
        return exported
    made = copy.copy(exported)
    made._graph_module = copy.deepcopy(exported.graph_module)
    made._graph_signature = copy.copy(exported.graph_signature)
    made._graph_signature.input_specs = [spec for spec in specs if spec.arg.name not in found]
    kept = {str(spec.target) for spec in made._graph_signature.input_specs}
    made._constants = {name: value for name, value in exported.constants.items() if name in kept}
    nodes = {node.name: node for node in made.graph.find_nodes(op="placeholder")}
    first = next(node for node in made.graph.nodes if node.op != "placeholder")
    for name, (spec, constant) in found.items():
        weight, node = nodes[spec.arg.name], nodes[name]
        with made.graph.inserting_before(first):
            node.replace_all_uses_with(_part_of(weight, held[str(spec.target)], constant, node.meta))
        made.graph.erase_node(node)
    made.graph_module.recompile()
    return made


def _part_of(weight: fx.Node, value: Tensor, constant: Tensor, meta: dict[str, Any]) -> fx.Node:
    """A constant as what it is of a weight."""
    if _layout(constant) == _layout(value):
        return weight
    node = weight.graph.call_function(
        _ATEN.as_strided.default,
        (weight, list(constant.shape), list(constant.stride()), constant.storage_offset()),
    )
    node.meta = {key: meta[key] for key in ("val",) if key in meta}
    return node


def _is_within(constant: Tensor, weight: Tensor) -> bool:
    """Whether a tensor that shares a weight's memory can be read of the weight, in whatever memory it is."""
    if constant.dtype != weight.dtype:
        return False
    whole = weight.is_contiguous() and weight.storage_offset() == 0
    end = constant.storage_offset() + sum(
        (size - 1) * step for size, step in zip(constant.shape, constant.stride(), strict=True)
    )
    return _layout(constant) == _layout(weight) or (whole and constant.numel() > 0 and end < weight.numel())


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


# --- Names of nodes that nothing else has.


#: attributes that every graph module has, or the one that torch.export makes of a program
_OF_GRAPH_MODULES = (
    frozenset(dir(fx.GraphModule))
    | vars(fx.GraphModule({}, fx.Graph())).keys()
    | {"meta", "range_constraints", "module_call_signatures"}
)


def check_names(weights: Iterable[str]) -> None:
    """Refuse weights under names that a graph module has for something else, such as a submodule ``graph``,
    or that are words of Python, such as ``class``.

    Raises:
        CaptureError: names the attribute.
    """
    for name in weights:
        first = name.partition(".")[0]
        reserved = next((part for part in name.split(".") if keyword.iskeyword(part)), None)
        if reserved is not None:
            raise CaptureError(
                f"the model holds '{name}', but '{reserved}' is a word of Python, which no graph can write;"
                f" rename '{reserved}' in the model"
            )
        if first in _OF_GRAPH_MODULES:
            raise CaptureError(
                f"the model holds '{name}', but torch.fx has '{first}' for an attribute of every graph;"
                f" rename '{first}' in the model"
            )


def own_names(module: nn.Module, graph: fx.Graph) -> None:
    """Rename nodes of a graph called like a weight of its module that they are not: inputs, and tensors that
    a graph makes, have channels by their names as weights have.

    An argument ``x`` beside a parameter ``x`` is such a one. A node called ``self`` hides the module in
    generated code.
    """
    weights = {
        name
        for name, _ in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
    }
    for node in graph.nodes:
        wanted, called = node.name, weights if node.op != "get_attr" else set()
        while node.name in called or node.name == "self":
            wanted = f"{wanted}_node"
            node._rename(wanted)
