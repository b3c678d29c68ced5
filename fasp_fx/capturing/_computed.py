"""Weights that a graph computes from parameters alone: where they stand, and what they are computed of."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..base.compat import OpOverload
from ..patterns import CASTS, letters_of, lookup
from ._fx import arguments, attribute, target_name, written_names
from ._program import region

Region = tuple[Any, ...]


@dataclass(eq=False)
class Computed:
    """One value that is computed from weights alone and stands in the place of a weight.

    Attributes:
        nodes: the nodes that compute it, each in the same way from the same weights.
        role: the name of the argument it is given as.
        cone: everything that the first of the nodes is computed of, in graph order, itself included.
        sources: the storage regions of the weights it is computed of, with one of their names.
    """

    nodes: list[fx.Node]
    role: str
    cone: list[fx.Node]
    sources: dict[Region, str] = field(default_factory=dict)

    @property
    def value(self) -> Tensor:
        """Its shape and type, as recorded."""
        found: Tensor = self.nodes[0].meta["val"]
        return found

    @property
    def bytes(self) -> int:
        """What it takes as a parameter."""
        return self.value.numel() * self.value.element_size()


def computed_weights(module: fx.GraphModule) -> list[Computed]:
    """All values computed from weights alone that an operator contracts with an activation, or adds to the
    product, in graph order.

    At least one of the weights is a parameter: what is made of buffers and constants alone is a fixed
    transform. Mere movements and casts of a weight are none: the analysis follows the weight through them.
    Nodes that compute the same of the same are one.
    """
    graph = module.graph
    constant = _constant(module)
    keys = _keys(module, constant)
    twins: dict[int, list[fx.Node]] = {}
    for node, key in keys.items():
        twins.setdefault(key, []).append(node)
    positions = {node: index for index, node in enumerate(graph.nodes)}
    found: dict[int, Computed] = {}
    for node in graph.nodes:
        if node in constant:
            continue
        for role, operand in _operands(node):
            for part in _computed(operand):
                value = part.meta.get("val")
                if part not in constant or not isinstance(value, Tensor) or not value.is_floating_point():
                    continue
                part = _moved_on(part, keys, twins)
                entry = found.get(keys[part])
                if entry is None:
                    entry = found[keys[part]] = Computed(
                        twins[keys[part]], role, sorted(_cone(part), key=positions.__getitem__)
                    )
                    for leaf in (node for node in entry.cone if node.op == "get_attr"):
                        entry.sources.setdefault(
                            region(attribute(module, target_name(leaf)), target_name(leaf)), target_name(leaf)
                        )
    return [
        entry
        for entry in found.values()
        if any(isinstance(attribute(module, name), nn.Parameter) for name in entry.sources.values())
    ]


def _moved_on(node: fx.Node, keys: dict[fx.Node, int], twins: dict[int, list[fx.Node]]) -> fx.Node:
    """The last of the movements that a computed value goes through before anything else is made of it: so it
    has the shape in which it is used.
    """
    while True:
        users = [user for twin in twins[keys[node]] for user in twin.users if not checks(user)]
        after = next(user for user in node.users if not checks(user))
        rule = lookup(after.target)
        if (
            after not in keys
            or {keys.get(user) for user in users} != {keys[after]}
            or rule is None
            or not rule.moves
            or after.all_input_nodes != [node]
        ):
            return node
        before, value = node.meta["val"], after.meta.get("val")
        if not isinstance(value, Tensor) or value.numel() > before.numel():
            return node
        node = after


def _constant(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose values are the same in every call: no input, no chance, and nothing that the graph
    writes to takes part.
    """
    written = {region(attribute(module, name), name) for name in written_names(module.graph)}
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            tensor = attribute(module, target_name(node))
            if isinstance(tensor, Tensor) and region(tensor, target_name(node)) not in written:
                found.add(node)
        elif (
            node.op == "call_function"
            and _repeatable(node.target)
            and all(source in found for source in node.all_input_nodes)
        ):
            found.add(node)
    return found


def _repeatable(target: Any) -> bool:
    if target is operator.getitem:
        return True
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags and "empty" not in target._schema.name


def _keys(module: fx.GraphModule, constant: set[fx.Node]) -> dict[fx.Node, int]:
    """A number for each constant node, the same for nodes that compute the same of the same weights."""
    numbers: dict[Any, int] = {}
    found: dict[fx.Node, int] = {}

    def number(item: Any) -> Any:
        return f"%{found[item]}" if isinstance(item, fx.Node) else item

    for node in module.graph.nodes:
        if node not in constant:
            continue
        key: Any
        if node.op == "get_attr":
            key = region(attribute(module, target_name(node)), target_name(node))
        else:
            given: Any = fx.node.map_aggregate((node.args, node.kwargs), number)
            key = (node.target, str(given))
        found[node] = numbers.setdefault(key, len(numbers))
    return found


def _operands(node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """The operands, by name, of an operator that contracts one with another. In attention it is activations
    that are contracted.
    """
    rule = lookup(node.target) if node.op == "call_function" else None
    if rule is None or rule.all("mix"):
        return
    given = arguments(node)
    for alternative in rule.alternatives:
        kept = {letter for dims in alternative.results for letter in letters_of(dims)}
        letters = [
            letter for operand in alternative.operands for letter in set(letters_of(operand.dims)) - kept
        ]
        if len(letters) > len(set(letters)):
            yield from (
                (operand.name, given[operand.name])
                for operand in alternative.operands
                if isinstance(given.get(operand.name), fx.Node)
            )
            return


def _computed(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes behind movements and casts that do more than move and cast."""
    if node.op != "call_function":
        return
    mover = node.args[0] if node.target is operator.getitem else node
    rule = lookup(mover.target) if isinstance(mover, fx.Node) else None
    moved = rule.moves if rule is not None and rule.moves else "self" if str(node.target) in CASTS else None
    if moved is None:
        yield node
        return
    parts = arguments(mover)[moved]  # type: ignore[arg-type]
    for part in parts if isinstance(parts, (list, tuple)) else [parts]:
        if isinstance(part, fx.Node):
            yield from _computed(part)


def _cone(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        top = stack.pop()
        if top not in found:
            found.add(top)
            stack.extend(top.all_input_nodes)
    return found


def checks(node: fx.Node) -> bool:
    """Whether a node only asserts something, which of a constant is known."""
    rule = lookup(node.target)
    return (
        bool(node.all_input_nodes)
        and rule is not None
        and not (rule.moves or rule.alternatives or rule.tallies or rule.creates)
    )
