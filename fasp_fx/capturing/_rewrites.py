"""What an exporter leaves in a graph, put right in the program's own graph, which nobody else may hold
meanwhile, or said of it.
"""

from __future__ import annotations

import copy
import functools
import keyword
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec

from fasp_fx.base import OpOverload, rename, settled_by, storage_of, with_parts
from fasp_fx.errors import CaptureError

from ._fx import arguments, draws, stand_for, weights_of
from ._program import region
from ._shapes import RECURRENT
from ._sizes import is_dynamic, shapes_of_inputs

# --- Sizes that an exporter took to vary until the program said what they are: numbers, once it is known.
#
# A node that computes one reads it of an input, which is not pruned; a number is adapted to what is left.


#: the code of exporters and operators, where sizes are settled by what meets what
_OPERATORS = tuple(str(Path(str(file)).parent) for file in (torch.__file__, Path(__file__).parent))


def settled_as_numbers(exported: ExportedProgram) -> ExportedProgram:
    """Write such sizes as the numbers that they are, in the program's own graph, which nobody else may hold;
    those that the program returns stay.
    """
    return _as_numbers(
        exported,
        {
            node: value.node.maybe_as_int()
            for node in exported.graph.nodes
            if isinstance(value := node.meta.get("val"), torch.SymInt)
            and node.op == "call_function"
            and not is_dynamic(value)
        },
    )


def constants_as_numbers(exported: ExportedProgram) -> ExportedProgram:
    """Write the real numbers that forward reads from tensors that are no weights (``stride[0].item()`` of a
    detector) as they are, in the program's own functional graph: to an exporter only a run tells them, and
    such a program is traced anew.
    """
    if not any(isinstance(node.meta.get("val"), torch.SymFloat) for node in exported.graph.nodes):
        return exported
    tensors = {
        spec.arg.name: exported.constants[str(spec.target)]
        for spec in exported.graph_signature.input_specs
        if spec.kind is InputKind.CONSTANT_TENSOR
    }
    values: dict[fx.Node, Any] = {
        node: tensors[node.name]
        for node in exported.graph.find_nodes(op="placeholder")
        if node.name in tensors and tensors[node.name].device.type != "meta"
    }
    for node in exported.graph.nodes:
        operands = node.all_input_nodes
        if operands and values.keys() >= set(operands) and node.op == "call_function" and not draws(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return _as_numbers(exported, {node: value for node, value in values.items() if isinstance(value, float)})


def _as_numbers(exported: ExportedProgram, numbers: dict[fx.Node, Any]) -> ExportedProgram:
    for user in exported.graph.nodes:
        if user.op != "output" and not numbers.keys().isdisjoint(user.all_input_nodes):
            user.args, user.kwargs = fx.map_arg(
                (user.args, user.kwargs), lambda operand: numbers.get(operand, operand)
            )
    for node in reversed(numbers):
        if not node.users:
            exported.graph.erase_node(node)
    if numbers:
        exported.graph_module.recompile()
    return exported


def fixed_sizes(exported: ExportedProgram) -> Iterator[str]:
    """What a user should know of sizes of the inputs that were to vary and do not.

    Features meet weights, in an operator; where forward asks for a number, the line that does so is known. A
    first dimension is that of samples, and spoken of whatever fixed it.
    """
    for name, shape in shapes_of_inputs(exported):
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
            yield f"the size {size} of dimension {dim} of '{name}' is fixed, because {why}"


_ATEN = torch.ops.aten


# --- Constants of a program that are its parameters or buffers, reached by another way.
#
# What forward reads from a list or dict of its own is a constant to an exporter, also where it is a
# parameter of the model. As a constant it would keep its values while weights are trained or loaded.


def as_weights(exported: ExportedProgram) -> ExportedProgram:
    """A program that reads its parameters and buffers wherever it reads their memory as a whole; the same one
    if it does already.

    Raises:
        CaptureError: it reads a part of a parameter as a constant; names it.
    """
    tensors = {**exported.constants, **exported.state_dict}
    specs = exported.graph_signature.input_specs
    weights = {
        _memory(tensors, spec): spec.arg.name
        for spec in reversed(specs)  # the first of several
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
    }
    replaced = {
        spec.arg.name: weights[memory]
        for spec in specs
        if spec.kind is InputKind.CONSTANT_TENSOR and (memory := _memory(tensors, spec)) in weights
    }
    parameters = {storage_of(tensors[name]): name for name in exported.graph_signature.parameters}
    for spec in specs:
        storage = storage_of(tensors[str(spec.target)]) if spec.kind is InputKind.CONSTANT_TENSOR else None
        if storage in parameters and spec.arg.name not in replaced:
            raise CaptureError(
                f"forward reads a part of '{parameters[storage]}' that it keeps elsewhere (a slice, say),"
                " which would be a constant and not be trained; take the part of it in forward"
            )
    if not replaced:
        return exported
    signature = copy.copy(exported.graph_signature)
    signature.input_specs = [spec for spec in specs if spec.arg.name not in replaced]
    kept = {str(spec.target) for spec in signature.input_specs}
    rewritten = with_parts(
        exported,
        graph_module=copy.deepcopy(exported.graph_module),
        graph_signature=signature,
        constants={name: value for name, value in exported.constants.items() if name in kept},
    )
    nodes = {node.name: node for node in rewritten.graph.find_nodes(op="placeholder")}
    for name, weight in replaced.items():
        nodes[name].replace_all_uses_with(nodes[weight])
        rewritten.graph.erase_node(nodes[name])
    rewritten.graph_module.recompile()
    return rewritten


def _memory(tensors: Mapping[str, Any], spec: InputSpec) -> tuple[Any, ...]:
    tensor = tensors[str(spec.target)]
    return *region(tensor, str(spec.target)), tensor.dtype


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
        if reserved := next(filter(keyword.iskeyword, name.split(".")), None):
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
    weights = weights_of(module)
    for node in graph.nodes:
        wanted, called = node.name, weights if node.op != "get_attr" else {}
        while node.name in called or node.name == "self":
            wanted = f"{wanted}_node"
            rename(node, wanted)


# --- Recurrent layers of a graph, one by one.


_ZEROS = (_ATEN.zeros.default, _ATEN.new_zeros.default)


def _layer_by_layer(
    operator: OpOverload, input: Tensor, hx: Any, params: list[Tensor], *settings: Any
) -> Any:
    """A recurrent operator of several layers or both directions, as one of each.

    Args:
        settings: has_biases, num_layers, dropout, train, bidirectional, batch_first.
    """
    has_biases, num_layers, dropout, train, bidirectional, batch_first = settings
    directions, steps = (2 if bidirectional else 1), (1 if batch_first else 0)
    if num_layers * directions == 1:
        raise NotImplementedError
    listed, count = isinstance(hx, (list, tuple)), len(params) // (num_layers * directions)
    last: list[list[Tensor]] = []
    for layer in range(num_layers):
        outputs = []
        for index in range(layer * directions, (layer + 1) * directions):
            turned = index % directions == 1
            source = _ATEN.flip.default(input, [steps]) if turned else input
            states = [_ATEN.slice.Tensor(state, 0, index, index + 1) for state in (hx if listed else [hx])]
            weights = params[index * count : (index + 1) * count]
            alone = (has_biases, 1, 0.0, False, False, batch_first)
            output, *after = operator(source, states if listed else states[0], weights, *alone)
            outputs.append(_ATEN.flip.default(output, [steps]) if turned else output)
            last.append(after)
        input = _ATEN.cat.default(outputs, 2) if len(outputs) > 1 else outputs[0]
        if train and dropout and layer + 1 < num_layers:
            input = _ATEN.dropout.default(input, dropout, True)
    return input, *(_ATEN.cat.default(list(states), 0) for states in zip(*last))


#: how recurrent operators are taken apart
LAYERS: dict[OpOverload, Callable[..., Any]] = {
    operator: functools.partial(_layer_by_layer, operator) for operator in RECURRENT
}


def own_states(graph: fx.Graph) -> None:
    """Let recurrent layers that begin with zeros begin with zeros of their own, so that no layers are coupled
    by them. They are made like the input, so that they go with the module to another device or type.
    """
    for node in [node for node in graph.nodes if node.target in RECURRENT]:
        for state in node.all_input_nodes:
            zeros: Any = state.args[0] if state.target is _ATEN.slice.Tensor else state
            is_own = state.target is _ATEN.new_zeros.default and len(state.users) == 1
            if not is_own and zeros.target in _ZEROS:
                size = [1, *arguments(zeros)["size"][1:]]
                with graph.inserting_before(node):
                    zero = graph.call_function(_ATEN.new_zeros.default, (arguments(node)["input"], size))
                stand_for(zero, node)
                zero.meta |= {"custom": zeros.meta.get("custom", {}), "val": state.meta["val"]}
                node.replace_input_with(state, zero)


# --- Flex attention as a compiler traces it.


FLEX = torch.ops.higher_order.flex_attention


def attend(*inputs: Any) -> Any:
    """The operator itself; for ``torch.compile``, with the tensors that its graphs read bound to them.

    An exported program hands those tensors to the operator as arguments of their own, the last two.
    ``torch.compile`` traces only calls without them, in which the graphs are functions that hold what they
    read, as it finds them in a model.
    """
    if not torch.compiler.is_dynamo_compiling():
        return FLEX(*inputs)
    query, key, value, score_mod, block_mask, scale, options, of_scores, of_masks = (*inputs, (), ())[:9]

    def score(*numbers: Tensor) -> Tensor:
        return score_mod(*numbers, *of_scores)

    def mask(*numbers: Tensor) -> Tensor:
        return block_mask[-1](*numbers, *of_masks)

    return FLEX(query, key, value, score, (*block_mask[:-1], mask), scale, options)


def make_traceable(graph: fx.Graph) -> None:
    """Let a compiler trace the flex attention of an exported graph; changes the graph."""
    for node in graph.find_nodes(op="call_function", target=FLEX):
        node.target = attend
