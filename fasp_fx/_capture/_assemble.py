"""Put an exported program together from a rewritten graph, where nothing has to be traced anew.

The operators of a rewritten program are those of the capture and of the passes, all functional. What is left
of an exporter's work is to record what each makes under the capture's symbolic sizes, to turn the weights
into inputs, and to say which input is which.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)

from .._calling._facts import ExportFacts, assumed, environment_of
from .._compat import FakeTensor, FakeTensorMode, HigherOrderOperator, OpOverload, refuse_new_guards
from ..channels import attribute, target_name
from ..errors import VerificationError
from ._quiet import quiet
from ._record import record
from ._steps import any_number_of_steps

_log = logging.getLogger("fasp_fx")

#: what an exporter calls the inputs that it makes of a module's tensors begins so
_PREFIXES = {InputKind.PARAMETER: "p", InputKind.BUFFER: "b", InputKind.CONSTANT_TENSOR: "c"}
_SYMBOLIC = (
    (torch.SymInt, SymIntArgument),
    (torch.SymFloat, SymFloatArgument),
    (torch.SymBool, SymBoolArgument),
)


def assemble(
    module: fx.GraphModule,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    facts: ExportFacts,
    before: fx.Graph | None = None,
) -> ExportedProgram | None:
    """The exported program of a graph module, over its own tensors.

    Args:
        module: a graph module with its weights as attributes; what its nodes make is recorded in it.
        example: positional and keyword arguments as the graph takes them.
        facts: of the capture that the module was made of.
        before: the graph of that capture, as for :func:`record`.

    Returns:
        ``None`` for a program that has to be traced: it writes into its inputs or weights, has regions of its
            own or sizes that data decide, or
        needs something of its sizes that the capture did not.
    """
    mode = _mode(module.graph)
    if (
        mode is None
        or not all(_is_functional(node) for node in module.graph.nodes)
        or not _looks_up_tensors(module)
    ):
        return None
    if assumed(module.graph) != facts.assumed or not _recorded(module, before):
        return None
    module.graph.eliminate_dead_code()
    graph = fx.Graph()
    lifted, specs = _lift(module, graph, mode)
    seen: dict[fx.Node, fx.Node] = {}
    inputs = iter(facts.inputs)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            seen[node] = lifted[target_name(node)]
        elif node.op == "placeholder":
            # By the caller's name, which a weight can have too.
            made = seen[node] = graph.placeholder(str(node.target))
            made.meta = dict(node.meta)
            specs.append(InputSpec(InputKind.USER_INPUT, _renamed(next(inputs), made.name), None))
        elif node.op != "output":
            made = seen[node] = graph.node_copy(node, seen.__getitem__)
            made.meta.pop("tensor_meta", None)  # an exporter's, of the shapes before
    (output,) = module.graph.find_nodes(op="output")
    results = tuple(fx.map_arg(output.args[0], seen.__getitem__))
    graph.output(results).meta.update(output.meta)
    signature = ExportGraphSignature(
        specs, [OutputSpec(OutputKind.USER_OUTPUT, _argument(result), None) for result in results]
    )
    held = {spec.target: attribute(module, spec.target) for spec in specs if spec.target is not None}
    stored = {
        spec.target
        for spec in specs
        if spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent)
    }
    return ExportedProgram(
        nn.Module(),
        graph,
        signature,
        {name: value for name, value in held.items() if name in stored},
        dict(facts.ranges),
        [facts.call],
        example,
        {name: value for name, value in held.items() if name not in stored},
    )


def _lift(
    module: fx.GraphModule, graph: fx.Graph, mode: FakeTensorMode
) -> tuple[dict[str, fx.Node], list[InputSpec]]:
    """Inputs of a graph for all tensors of a module, in the order in which exporters have them."""
    persistent = module.state_dict(keep_vars=True).keys()
    tensors: list[tuple[InputKind, str, Tensor]] = [
        *(
            (InputKind.PARAMETER, name, value)
            for name, value in module.named_parameters(remove_duplicate=False)
        ),
        *((InputKind.BUFFER, name, value) for name, value in module.named_buffers(remove_duplicate=False)),
    ]
    known = {name for _, name, _ in tensors}
    looked_up = dict.fromkeys(target_name(node) for node in module.graph.find_nodes(op="get_attr"))
    tensors += [
        (InputKind.CONSTANT_TENSOR, name, attribute(module, name)) for name in looked_up if name not in known
    ]
    taken = {str(node.target) for node in module.graph.find_nodes(op="placeholder")}
    lifted, specs = {}, []
    for kind, name, value in tensors:
        wanted = f"{_PREFIXES[kind]}_{name.replace('.', '_')}"
        while wanted in taken:
            wanted += "_"
        node = lifted[name] = graph.placeholder(wanted)
        taken.add(node.name)
        node.meta["val"] = mode.from_tensor(value, static_shapes=True)
        specs.append(
            InputSpec(
                kind,
                TensorArgument(node.name),
                name,
                name in persistent if kind is InputKind.BUFFER else None,
            )
        )
    return lifted, specs


def _mode(graph: fx.Graph) -> FakeTensorMode | None:
    return next(
        (value.fake_mode for node in graph.nodes if isinstance(value := node.meta.get("val"), FakeTensor)),
        None,
    )


def _is_functional(node: fx.Node) -> bool:
    """Whether a node may stand in an exported graph as it is."""
    if node.op != "call_function":
        return node.op != "call_module"
    if isinstance(node.target, OpOverload):
        return not node.target._schema.is_mutable and "unbacked_bindings" not in node.meta
    return not isinstance(node.target, HigherOrderOperator)


def _recorded(module: fx.GraphModule, before: fx.Graph | None) -> bool:
    """Record what every node makes; whether that can be, without assuming anything new of the sizes."""
    environment = environment_of(module.graph)
    with (
        quiet(),
        any_number_of_steps(),
        contextlib.nullcontext() if environment is None else refuse_new_guards(environment),
    ):
        try:
            record(module, before)
        except VerificationError as error:
            _log.info("the program is traced: %s", error)
            return False
    return True


def _looks_up_tensors(module: fx.GraphModule) -> bool:
    return all(
        isinstance(attribute(module, target_name(node)), Tensor)
        for node in module.graph.find_nodes(op="get_attr")
    )


def _renamed(argument: Any, name: str) -> Any:
    return (
        ConstantArgument(name, argument.value)
        if isinstance(argument, ConstantArgument)
        else type(argument)(name)
    )


def _argument(result: Any) -> Any:
    """What an output is."""
    if not isinstance(result, fx.Node):
        return ConstantArgument("", result)
    value = result.meta.get("val")
    return next(
        (argument(result.name) for kind, argument in _SYMBOLIC if isinstance(value, kind)),
        TensorArgument(result.name),
    )


__all__ = ["ExportFacts", "assemble"]
