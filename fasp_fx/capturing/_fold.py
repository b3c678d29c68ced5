"""Fold weights that the model computes from parameters in every call into plain parameters, which can be
pruned.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fasp_fx.base import pytree
from fasp_fx.patterns import CASTS, letters_of, lookup

from ._fx import arguments, attribute, draws, is_pure, remove_dead, target_name, written_names
from ._program import FoldedWeight, Program, free_name, region, set_weight

Region = tuple[Any, ...]

#: names under which torch.nn.utils.parametrize keeps what a weight is computed from
_PARAMETRIZED = ".parametrizations."

#: key of ``node.meta`` under which a node that computes a weight says why no parameter stands in its place
WHY_NOT_FOLDED = "fasp_fx_not_folded"


def fold(program: Program) -> Program:
    """Put parameters in the place of weights that the graph computes from weights alone by more than movement
    and casts; changes the module, and says so in the program.

    Each is evaluated once, by the operators of the graph, so that the graph computes what it computed, bit by
    bit. Weights that nothing else needs go. A weight is not folded if the module would take more bytes with
    it: a product of two thin matrices, integers with a scale, or a weight that is needed elsewhere as it is.
    Its node then carries the reason, for the analysis.

    Args:
        program: a functional one. None of the names of the caller's weights is given to another.
    """
    module, weights = program.module, program.weights()
    computed = _computed_weights(module, weights)
    chosen, freed = _chosen(module, computed)
    notes = tuple(_refused(module, entry) for entry in computed if entry not in chosen)
    if not chosen:
        return replace(program, notes=(*program.notes, *notes))
    gone = {name for name, tensor in weights.items() if region(tensor, name) in freed}
    taken = {*program.order, *weights} - gone
    folded = []
    for entry in chosen:
        name = free_name(_name(entry, weights, gone), taken)
        taken.add(name)
        trained = any(attribute(module, source).requires_grad for source in entry.sources.values())
        folded.append((entry, name, nn.Parameter(_evaluate(module, entry), requires_grad=trained)))
    for name in gone:
        owner, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(owner), leaf)
    for entry, name, parameter in folded:
        set_weight(module, name, parameter)
        with module.graph.inserting_before(entry.node):
            weight = module.graph.get_attr(name)
        kept = entry.node.meta.keys() & {"val", "nn_module_stack", "stack_trace"}
        weight.meta.update({key: entry.node.meta[key] for key in kept})
        entry.node.replace_all_uses_with(weight)
    remove_dead(module.graph)
    for node in module.graph.find_nodes(op="get_attr"):
        if not node.users and target_name(node) in gone:
            module.graph.erase_node(node)
    folds = tuple(FoldedWeight(name, tuple(entry.sources.values())) for entry, name, _ in folded)
    more = f" and {len(folds) - 4} more (plan.folds)" if len(folds) > 4 else ""
    note = (
        "weights that the model computes from others were folded, and training now trains the folded weight:"
        f" {', '.join(map(str, folds[:4]))}{more}"
    )
    replaced = {name: weights[name] for name in gone}
    return replace(program, folds=folds, replaced=replaced, notes=(*program.notes, note, *notes))


def _refused(module: fx.GraphModule, entry: Computed) -> str:
    of = ", ".join(map(repr, entry.sources.values()))
    before = sum(attribute(module, name).nbytes for name in entry.sources.values())
    since = (
        f"{entry.bytes:,} bytes instead of {before:,}"
        if entry.bytes > before
        else "what it is computed of is needed elsewhere as well"
    )
    why = f"folded into one parameter it would make the model larger ({since})"
    entry.node.meta[WHY_NOT_FOLDED] = why
    return f"a weight that the model computes of {of} stays as it is: {why}"


def _chosen(module: fx.GraphModule, computed: list[Computed]) -> tuple[list[Computed], set[Region]]:
    """Those that take no more bytes than the weights that go with them, and the memory of those weights; of
    several that are computed of one weight, the first has its bytes.
    """
    chosen = computed
    regions = {
        node: region(tensor, target_name(node))
        for node in module.graph.find_nodes(op="get_attr")
        if isinstance(tensor := attribute(module, target_name(node)), Tensor)
    }
    sources = {key: name for entry in computed for key, name in entry.sources.items()}
    while True:
        needless = {entry.node for entry in chosen}
        for node in reversed(module.graph.nodes):
            if node.op == "get_attr" or (node.op == "call_function" and node.users):
                needless.update([node] if needless.issuperset(node.users) else [])
        freed = sources.keys() - {key for node, key in regions.items() if node not in needless}
        sizes = {key: attribute(module, sources[key]).nbytes for key in freed}
        fits = [entry for entry in chosen if entry.bytes <= sum(sizes.pop(key, 0) for key in entry.sources)]
        if len(fits) == len(chosen):
            return chosen, freed
        chosen = fits


def _evaluate(module: fx.GraphModule, entry: Computed) -> Tensor:
    interpreter = fx.Interpreter(module)
    with torch.no_grad():
        for node in entry.cone:
            interpreter.env[node] = interpreter.run_node(node)
        return interpreter.env[entry.node].detach().clone()  # of no other's storage


def _name(entry: Computed, weights: dict[str, Tensor], gone: set[str]) -> str:
    """The name of the attribute that is parametrised; else that of the one parameter it replaces, or one made
    of the largest's.
    """
    names = list(entry.sources.values())
    for name in names:
        owner, is_parametrized, rest = f".{name}".partition(_PARAMETRIZED)
        if is_parametrized:
            return f"{owner}.{rest.partition('.')[0]}".lstrip(".")
    parameters = {name for name in names if isinstance(weights[name], nn.Parameter)}
    main = max(names, key=lambda name: (name in gone, name in parameters, weights[name].numel()))
    owner, dot, leaf = main.rpartition(".")
    if leaf.startswith(f"{entry.role}_"):  # weight_v, weight_orig: what a hook makes a weight of
        return f"{owner}{dot}{entry.role}"
    alike = weights[main].shape == entry.value.shape
    return main if alike and (leaf == entry.role or parameters == {main}) else f"{main}_folded"


# --- Weights that a graph computes from parameters alone: where they stand, and what they are computed of.


@dataclass(eq=False)
class Computed:
    """One value that is computed from weights alone and stands in the place of a weight.

    Attributes:
        node: computes it.
        role: the name of the argument it is given as.
        cone: everything that the node is computed of, in graph order, itself included.
        sources: the storage regions of the weights it is computed of, with one of their names.
    """

    node: fx.Node
    role: str
    cone: list[fx.Node]
    sources: dict[Region, str]

    @property
    def value(self) -> Tensor:
        """Its shape and type, as recorded."""
        return self.node.meta["val"]

    @property
    def bytes(self) -> int:
        """What it takes as a parameter."""
        return self.value.numel() * self.value.element_size()


def _computed_weights(module: fx.GraphModule, weights: Mapping[str, Tensor]) -> list[Computed]:
    """All values computed from weights alone that an operator contracts with an activation, or adds to the
    product, in graph order.

    At least one of the weights is a parameter: what is made of buffers and constants alone is a fixed
    transform. Mere movements and casts of a weight are none: the analysis follows the weight through them.
    """
    cones = _constant(module)
    for node in list(module.graph.nodes):
        unread = node.op == "call_function" and not node.users and not draws(node)
        if unread and node.all_input_nodes and cones.keys() >= set(node.all_input_nodes):
            module.graph.erase_node(node)  # it asserts what is known of constants, say
    positions = {node: index for index, node in enumerate(module.graph.nodes)}
    computed: dict[fx.Node, Computed] = {}
    for node in [node for node in module.graph.nodes if node not in cones]:
        for role, part in [(role, part) for role, operand in _operands(node) for part in _computed(operand)]:
            value = part.meta.get("val")
            if part not in cones or not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            moved = _moved_on(part)
            cone = sorted(cones[moved], key=positions.__getitem__)
            sources: dict[Region, str] = {}
            for name in (target_name(leaf) for leaf in cone if leaf.op == "get_attr"):
                if name in weights:  # not a constant that forward makes
                    sources.setdefault(region(weights[name], name), name)
            if any(isinstance(weights[name], nn.Parameter) for name in sources.values()):
                computed.setdefault(moved, Computed(moved, role, cone, sources))
    return list(computed.values())


def _moved_on(node: fx.Node) -> fx.Node:
    """The last of the movements that a computed value goes through before anything else is made of it: so it
    has the shape in which it is used.
    """
    while len(node.users) == 1:
        (after,) = node.users
        rule, value = lookup(after.target), after.meta.get("val")
        if (
            rule is None
            or not rule.moves
            or after.all_input_nodes != [node]
            or not isinstance(value, Tensor)
            or value.numel() > node.meta["val"].numel()
        ):
            break
        node = after
    return node


def _constant(module: fx.GraphModule) -> dict[fx.Node, set[fx.Node]]:
    """The nodes whose values are the same in every call, with all that they are computed of, themselves
    included: no input, no chance, and nothing that the graph writes to takes part.
    """
    written = {region(attribute(module, name), name) for name in written_names(module.graph)}
    cones: dict[fx.Node, set[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            tensor = attribute(module, target_name(node))
            if isinstance(tensor, Tensor) and region(tensor, target_name(node)) not in written:
                cones[node] = {node}
        elif (
            node.op == "call_function"
            and is_pure(node)
            and "empty" not in str(node.target)
            and cones.keys() >= set(node.all_input_nodes)
        ):
            cones[node] = {node}.union(*(cones[source] for source in node.all_input_nodes))
    return cones


def _operands(node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """The operands, by name, of an operator that contracts one with another. In attention it is activations
    that are contracted.
    """
    rule = lookup(node.target) if node.op == "call_function" else None
    if rule is None or rule.all("mix"):
        return
    operands = arguments(node)
    for alternative in rule.alternatives:
        kept = {letter for dims in alternative.results for letter in letters_of(dims)}
        letters = [
            letter for operand in alternative.operands for letter in set(letters_of(operand.dims)) - kept
        ]
        if len(letters) > len(set(letters)):
            yield from (
                (operand.name, operands[operand.name])
                for operand in alternative.operands
                if isinstance(operands.get(operand.name), fx.Node)
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
    for part in pytree.tree_leaves(arguments(mover)[moved]):  # type: ignore[arg-type]
        if isinstance(part, fx.Node):
            yield from _computed(part)
