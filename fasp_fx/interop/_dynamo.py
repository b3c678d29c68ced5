"""Read a graph that dynamo hands to a backend: which of its inputs are weights of the model, and what it
computes, in operators that the library reads.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ..base._tolerable import tolerable
from ..base.compat import assign_attr
from ..base.compat._dynamo import (
    SET_GRAD,
    InstructionTranslator,
    TracingContext,
    aot_export_module,
    tracing,
)
from ..capturing import (
    any_number_of_steps,
    is_plain_graph,
    single_layers,
    take_apart,
)
from ..capturing._attention import FLEX
from ..capturing._program import Program, graph_module
from ..capturing._signature import CallSignature
from ..errors import CaptureError, first_line


def holders(graph: fx.Graph) -> list[nn.Module]:
    """The modules whose weights the graph takes, as the compiled function names them: usually the compiled
    module alone.
    """
    found = [_holder(node) for node in graph.find_nodes(op="placeholder")]
    return list({id(holder): holder for holder in found if holder is not None}.values())


def _holder(node: fx.Node) -> nn.Module | None:
    """The outermost module that an input of the graph is found in."""
    frame = InstructionTranslator.current_tx()
    source = getattr(node.meta.get("grapharg"), "source", None)
    chain = []
    while source is not None:
        chain.append(source)
        source = getattr(source, "base", None)
    values = (_value(outer, frame) for outer in reversed(chain))
    return next((value for value in values if isinstance(value, nn.Module)), None)


def _value(source: Any, frame: Any) -> Any:
    try:
        return source.get_value({"G": frame.f_globals}, {"L": frame.f_locals, "G": frame.f_globals}, {})
    except (KeyError, AttributeError, NameError, TypeError, NotImplementedError):
        # Not a place in the frame: a temporary, a global of another module.
        return None


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module under all their names."""
    return dict(
        [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    )


def trace(module: fx.GraphModule, grad: bool) -> fx.GraphModule:
    """The functional graph of operators behind a graph of dynamo's, under dynamo's symbolic sizes; inputs and
    outputs as they were.

    Args:
        module: the graph module that dynamo made.
        grad: whether gradients flow: regions without them then hand on detached values.

    Raises:
        CaptureError: it writes into its inputs, changes modes that cannot be carried over, or cannot be
            traced.
    """
    if module.graph.find_nodes(op="call_function", target=FLEX):
        # The attempt would leave torch in a state in which nothing compiles.
        raise CaptureError(
            f"it calls {FLEX}, whose graphs cannot be traced here; compile the module of fasp_fx.apply(model,"
            " plan, args) instead"
        )
    module = _with_floats(module)
    given = [node.meta.get("example_value") for node in module.graph.find_nodes(op="placeholder")]
    try:
        traced = _traced(module, given)
        take_apart(traced.graph)
    except CaptureError:
        raise
    except tolerable(Exception) as error:
        raise CaptureError(f"the graph cannot be traced: {first_line(error)}") from error
    _without_modes(traced.graph, grad)
    single_layers(traced.graph)
    if not is_plain_graph(traced.graph):
        strange = next(node for node in traced.graph.nodes if not is_plain_graph(_alone(node)))
        raise CaptureError(f"the graph calls {strange.target}")
    traced.recompile()
    return traced


def _with_floats(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with the floats that modules hold, an epsilon or a slope, as the constants they are. Where
    sizes are dynamic, dynamo hands them over as inputs; it compiles anew should one change.

    Raises:
        CaptureError: a float of the call is an input.
    """
    items = [
        node
        for node in module.graph.find_nodes(op="call_method", target="item")
        if isinstance(node.meta.get("example_value"), torch.SymFloat)
        and getattr(node.args[0].meta.get("grapharg"), "pass_arg_as_tensor", False)  # a float of Python's
    ]
    if not items:
        return module
    for node in items:
        given = cast(fx.Node, node.args[0])
        if _holder(given) is None:
            raise CaptureError(
                f"it takes the float '{given.name}' as an input, which may be another in each call; pass a"
                " tensor, or set torch._dynamo.config.specialize_float = True, which compiles once for each"
                " value"
            )
    graph, copies = fx.Graph(), dict[fx.Node, Any]()
    for node in module.graph.nodes:
        if node in items:
            copies[node] = float(node.meta["example_value"])  # which dynamo then guards
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(module, graph)


def _traced(module: nn.Module, given: list[Any]) -> fx.GraphModule:
    with tracing(TracingContext(TracingContext.get().fake_mode)), torch.no_grad(), any_number_of_steps():
        made, signature = aot_export_module(
            module, given, trace_joint=False, pre_dispatch=True, decompositions={}
        )
    if signature.buffers_to_mutate or signature.parameters_to_mutate or signature.user_inputs_to_mutate:
        raise CaptureError("the graph writes into its inputs or buffers")
    return cast(fx.GraphModule, made)


def _alone(node: fx.Node) -> fx.Graph:
    graph = fx.Graph()
    graph.node_copy(node, lambda argument: graph.placeholder(argument.name))
    return graph


def _without_modes(graph: fx.Graph, grad: bool) -> None:
    """Take out the switches of the gradient mode; what a region without gradients hands on is detached."""
    start = enabled = torch.is_grad_enabled()
    inside: dict[fx.Node, bool] = {}
    for node in list(graph.nodes):
        if node.target is SET_GRAD:
            enabled = bool(node.args[0])
            if enabled and not start:
                raise CaptureError("the graph switches gradients on")
            graph.erase_node(node)
        elif node.op == "call_function":
            inside[node] = enabled
    for node, tracked in inside.items():
        outside = [user for user in node.users if inside.get(user, start)]
        if not grad or tracked or not outside or not isinstance(node.meta.get("val"), Tensor):
            continue
        with graph.inserting_after(node):
            detached = graph.call_function(torch.ops.aten.detach.default, (node,))
        detached.meta["val"] = node.meta["val"]
        for user in outside:
            user.replace_input_with(node, detached)


def as_program(
    traced: fx.GraphModule,
    weights: dict[int, tuple[str, Tensor]],
    order: tuple[str, ...],
    aliases: dict[str, list[str]],
) -> Program:
    """A program of a traced graph.

    Args:
        traced: the graph; all weights are inputs.
        weights: name and tensor of each input that is a weight, by its position.
        order: the names of the model's weights in their order.
        aliases: all names of each weight, by its first.
    """
    root = nn.Module()
    for name, tensor in weights.values():
        for alias in aliases[name]:
            assign_attr(tensor, root, alias)
    graph = traced.graph
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        if position in weights:
            with graph.inserting_before(node):
                read = graph.create_node("get_attr", weights[position][0])
            read.meta.update(node.meta)
            node.replace_all_uses_with(read)
            graph.erase_node(node)
    for name, value in vars(traced).items():  # constants that tracing has lifted
        if isinstance(value, Tensor):
            setattr(root, name, value)
    for kind in ("_buffers", "_parameters", "_modules"):
        for name, value in getattr(traced, kind).items():
            if value is not None and not hasattr(root, name):
                setattr(root, name, value)
    return Program(
        graph_module(root, graph, traced.meta),
        CallSignature(inspect.Signature(), (), {}),
        ((), {}),
        order=order,
    )
