"""Typed access to the loosely typed parts of fx nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload


def attribute(module: torch.nn.Module, target: str) -> Any:
    """The attribute of a nested module by its dotted path."""
    found: Any = module
    for part in target.split("."):
        found = getattr(found, part)
    return found


def target_name(node: fx.Node) -> str:
    """The dotted path that a ``get_attr`` node reads."""
    return str(node.target)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by their schema names, defaults included; by position where the target has no schema."""
    if not isinstance(node.target, OpOverload):
        return {str(index): value for index, value in enumerate(node.args)} | dict(node.kwargs)
    schema = node.target._schema.arguments
    given: dict[str, Any] = {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    given.update(node.kwargs)
    for argument in schema:
        if argument.name not in given and argument.has_default_value():
            given[argument.name] = argument.default_value
    return given


def elements(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments with those that are lists taken apart, ``name.0``, ``name.1`` …, as rules name them."""
    return {
        key: item
        for name, value in given.items()
        for key, item in ([(f"{name}.{index}", item) for index, item in enumerate(value)] if isinstance(value, (list, tuple)) else [(name, value)])
    }


def set_argument(node: fx.Node, name: str, value: Any) -> bool:
    """Set an argument by its schema name; whether that changed it."""
    if arguments(node)[name] == value:
        return False
    assert isinstance(node.target, OpOverload)
    index = next(i for i, argument in enumerate(node.target._schema.arguments) if argument.name == name)
    if index < len(node.args):
        node.update_arg(index, value)
    else:
        node.update_kwarg(name, value)
    return True


def results(graph: fx.Graph) -> list[Any]:
    """The graph's results in order."""
    returned: Any = graph.find_nodes(op="output")[0].args[0]
    return list(returned)
