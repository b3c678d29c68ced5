"""Typed access to the loosely typed parts of fx nodes, and which pass wrote a node."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Hashable, Iterable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from fasp_fx.base import OpOverload, pytree, schema_of
from fasp_fx.patterns import argument_names

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def attribute(module: torch.nn.Module, target: str) -> Any:
    """The attribute of a nested module by its dotted path."""
    return operator.attrgetter(target)(module)


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a module by name; tied ones under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def grouped(items: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """For each key, the values that come with it, in their order."""
    values: dict[K, list[V]] = {}
    for key, value in items:
        values.setdefault(key, []).append(value)
    return values


def tied_names(model: torch.nn.Module) -> dict[str, list[str]]:
    """For each name of a parameter, all names of that parameter, itself among them."""
    of_one = grouped((id(tensor), name) for name, tensor in model.named_parameters(remove_duplicate=False))
    return {name: names for names in of_one.values() for name in names}


def target_name(node: fx.Node) -> str:
    """The dotted path that a ``get_attr`` node reads."""
    return str(node.target)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by their declared names, defaults included; by position where the target
    declares none.
    """
    declared = argument_names(node.target)
    if not declared:
        return {str(index): value for index, value in enumerate(node.args)} | dict(node.kwargs)
    passed: dict[str, Any] = {**dict(zip(declared, node.args, strict=False)), **node.kwargs}
    return passed | {
        name: default
        for name, default in declared.items()
        if name not in passed and default is not inspect.Parameter.empty
    }


def elements(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with those that are lists taken apart, ``name.0``, ``name.1`` …, as rules name them."""
    return {
        key: item
        for name, value in arguments.items()
        for key, item in (
            [(f"{name}.{index}", item) for index, item in enumerate(value)]
            if isinstance(value, (list, tuple))
            else [(name, value)]
        )
    }


def set_argument(node: fx.Node, name: str, value: Any) -> bool:
    """Set an argument by its declared name; whether that changed it."""
    if arguments(node)[name] == value:
        return False
    index = list(argument_names(node.target)).index(name)
    if index < len(node.args):
        node.update_arg(index, value)
    else:
        node.update_kwarg(name, value)
    return True


#: flags with which a norm writes into its running statistics, which its schema does not say
_WRITES_STATISTICS = ("training", "use_input_stats")


def written_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose storage a node writes into."""
    if not isinstance(node.target, OpOverload) or not _may_write(node.target):
        return []
    named = arguments(node)
    taken = [named.get(argument.name) for argument in schema_of(node.target).arguments if argument.is_write]
    if any(named.get(flag) for flag in _WRITES_STATISTICS):
        taken += [named.get("running_mean"), named.get("running_var")]
    return [viewed(value) for value in pytree.tree_leaves(taken) if isinstance(value, fx.Node)]


@cache
def _may_write(operator: OpOverload) -> bool:
    """Whether an operator writes into any of its arguments, always or when a flag says so."""
    return any(
        argument.is_write or argument.name in _WRITES_STATISTICS for argument in schema_of(operator).arguments
    )


def written_names(graph: fx.Graph) -> set[str]:
    """The names of the tensors that a graph looks up and writes into."""
    return {
        target_name(written)
        for node in graph.nodes
        for written in written_by(node)
        if written.op == "get_attr"
    }


def viewed(node: fx.Node) -> fx.Node:
    """The node whose storage a node shows: to write into a view, or into what is detached, is to write into
    that.
    """
    while (
        isinstance(node.target, OpOverload)
        and node.args
        and isinstance(node.args[0], fx.Node)
        and any(result.alias_info is not None for result in schema_of(node.target).returns)
    ):
        node = node.args[0]
    return node


def call_in_words(node: fx.Node, value: Callable[[fx.Node], Any]) -> str:
    """What a node is called with, as far as what it gives on tensors without values depends on it.

    Args:
        value: what an operand gives.
    """
    operands = node.all_input_nodes

    def said(operand: fx.Node) -> str:
        shown = value(operand)
        if isinstance(shown, Tensor):
            shown = f"{shown.dtype} {shown.shape} {shown.stride()} {shown.device} {shown.requires_grad}"
        return f"{operands.index(operand)}: {shown}"

    return f"{node.target}{fx.map_arg((node.args, dict(node.kwargs)), said)}"


def put_behind(node: fx.Node, function: Callable[..., Any], *args: Any) -> fx.Node:
    """Let what reads a node read what a function makes of it and further arguments: the new node."""
    with node.graph.inserting_after(node):
        made = node.graph.call_function(function, (node, *args))
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    return made


def views_may_copy(graph: fx.Graph) -> None:
    """Let changes of shape copy where no view can be."""
    for view in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        for node in graph.find_nodes(op="call_function", target=view):
            node.target = torch.ops.aten.reshape.default


def way_from_weight(operand: fx.Node) -> list[fx.Node]:
    """The nodes that lead from a weight to an operand which holds it, moved or cast; both included."""
    way = [operand]
    while way[0].op != "get_attr":
        source = way[0].args[0]
        assert isinstance(source, fx.Node)
        way.insert(0, source)
    return way


def results(graph: fx.Graph) -> list[Any]:
    """The graph's results in order."""
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def applied(node: fx.Node, target: Callable[..., Any]) -> Any:
    """What a function makes of what is recorded of the arguments of a node."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda operand: operand.meta["val"])
    return target(*args, **kwargs)


# --- What a graph computes in vain: what nothing reads, and dropouts that are off.


#: return their input itself in evaluation mode, which functionalising them whole does not know
_DROPOUTS = tuple(
    getattr(torch.ops.aten, name).default
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
)


def remove_dropouts(graph: fx.Graph) -> None:
    """Let what reads a dropout that is off read its input.

    One that the graph returns stays: what is returned must be no input.
    """
    for dropout in _DROPOUTS:
        for node in graph.find_nodes(op="call_function", target=dropout):
            named = arguments(node)
            if named["train"] is False and not any(user.op == "output" for user in node.users):
                node.replace_all_uses_with(named["input"])
                graph.erase_node(node)


def remove_dead(graph: fx.Graph) -> None:
    """Remove what a model computes without using it, such as a statistic that somebody logged once: it would
    keep channels for nothing.

    What draws random numbers stays, since those after it would be others.
    """
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and is_pure(node):
            graph.erase_node(node)


def is_pure(node: fx.Node) -> bool:
    """Whether a call does nothing but compute its result, always the same of the same arguments."""
    if isinstance(node.target, OpOverload):
        return not draws(node) and not node.is_impure(impure_random=False)
    return getattr(node.target, "__module__", None) in ("_operator", "operator")


def draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers. What has a dropout that is off (attention, recurrent layers)
    could, and does not.
    """
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    named = arguments(node)
    return named.get("dropout_p") != 0.0 and named.get("train") is not False


# --- Which pass wrote a node.


#: key of ``node.meta``, and of ``node.meta["custom"]``, under which a node that a pass wrote carries the
#: pass's name
WRITTEN_BY = "fasp_fx_pass"


def stamp(node: fx.Node, name: str, like: fx.Node | None = None) -> fx.Node:
    """Mark a node as written by the pass ``name``; provenance such as the module stack is taken from
    ``like``.
    """
    if like is not None:
        stand_for(node, like)
    node.meta[WRITTEN_BY] = name
    # What exporting, decomposing and saving keep of a node's meta.
    node.meta["custom"] = {**node.meta.get("custom", {}), WRITTEN_BY: name}
    return node


def stand_for(node: fx.Node, like: fx.Node) -> None:
    """Say of a node that it comes from where ``like`` does: without its module stack, torch cannot unflatten
    the program, and without either quantisers pass it over; and what was noted of ``like``, under ``custom``.
    """
    for key in ("nn_module_stack", "torch_fn", "stack_trace", "source_fn_stack", "from_node", "custom"):
        if key in like.meta:
            node.meta[key] = like.meta[key]


def read_stamps(graph: fx.Graph) -> None:
    """Show again what an export kept of the stamps."""
    for node in graph.nodes:
        if name := node.meta.get("custom", {}).get(WRITTEN_BY):
            node.meta[WRITTEN_BY] = name
