"""Fold weights that the model computes from parameters in every call into plain parameters, which can be
pruned.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..base.compat import OpOverload
from ..patterns import CASTS, letters_of, lookup
from ._fx import arguments, attribute, target_name, written_names
from ._program import FoldedWeight, region

Region = tuple[Any, ...]

#: names under which torch.nn.utils.parametrize keeps what a weight is computed from
_PARAMETRIZED = ".parametrizations."
_SUFFIX = "_folded"

#: key of ``node.meta`` under which a node that computes a weight says why no parameter stands in its place
WHY_NOT_FOLDED = "fasp_fx_not_folded"


@dataclass
class Folding:
    """What was folded in one graph module.

    Attributes:
        folds: the folded weights.
        replaced: parameters and buffers of the caller's that the graph no longer needs, by name.
        notes: what a user should know of it.
    """

    folds: tuple[FoldedWeight, ...] = ()
    replaced: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def fold(module: fx.GraphModule, order: Iterable[str]) -> Folding:
    """Put parameters in the place of weights that the graph computes from weights alone by more than movement
    and casts; changes ``module``.

    Each is evaluated once, by the operators of the graph, so that the graph computes what it computed, bit by
    bit. Weights that nothing else needs go. A weight is not folded if the module would take more bytes with
    it: a product of two thin matrices, integers with a scale, or a weight that is needed elsewhere as it is.
    Its nodes then carry the reason, for the analysis.

    Args:
        module: a functional graph whose weights are ``get_attr`` nodes.
        order: the names of the caller's weights, none of which is given to another.
    """
    found = computed_weights(module)
    if not found:
        return Folding()
    looked_up = _looked_up(module)
    chosen, dead = _chosen(module, found, looked_up)
    notes = tuple(_refused(module, entry) for entry in found if entry not in chosen)
    if not chosen:
        return Folding(notes=notes)
    freed = {key for key, nodes in looked_up.items() if dead.issuperset(nodes)}
    for key in looked_up.keys() - freed:
        dead.difference_update(node for node in looked_up[key] if not node.users)  # its other names
    weights = dict(
        [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    )
    gone = {name for name, tensor in weights.items() if region(tensor, name) in freed}
    replaced = {name: weights[name] for name in gone}
    taken = {*order, *weights} - gone
    folds, made = [], []
    for entry in chosen:
        name = _free(_name(entry, weights, gone), taken)
        taken.add(name)
        trained = any(attribute(module, source).requires_grad for source in entry.sources.values())
        made.append((entry, name, nn.Parameter(_evaluate(module, entry), requires_grad=trained)))
        folds.append(FoldedWeight(name, tuple(entry.sources.values())))
    for name in gone:
        owner, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(owner), leaf)
    for entry, name, parameter in made:
        _put(module, entry, name, parameter)
    for node in reversed(module.graph.nodes):
        if node in dead:
            module.graph.erase_node(node)
    return Folding(tuple(folds), replaced, (_told(folds), *notes))


def _told(folds: list[FoldedWeight]) -> str:
    shown = ", ".join(map(str, folds[:4])) + (
        f" and {len(folds) - 4} more (plan.folds)" if len(folds) > 4 else ""
    )
    return (
        "weights that the model computes from others were folded, and training now trains the folded weight:"
        f" {shown}"
    )


def _refused(module: fx.GraphModule, entry: Computed) -> str:
    of = ", ".join(map(repr, entry.sources.values()))
    before = sum(_bytes(attribute(module, name)) for name in entry.sources.values())
    since = (
        f"{entry.bytes:,} bytes instead of {before:,}"
        if entry.bytes > before
        else "what it is computed of is needed elsewhere as well"
    )
    why = f"folded into one parameter it would make the model larger ({since})"
    for node in entry.nodes:
        node.meta[WHY_NOT_FOLDED] = why
    return f"a weight that the model computes of {of} stays as it is: {why}"


# --- what is folded


def _looked_up(module: fx.GraphModule) -> dict[Region, list[fx.Node]]:
    found: dict[Region, list[fx.Node]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        tensor = attribute(module, target_name(node))
        if isinstance(tensor, Tensor):
            found.setdefault(region(tensor, target_name(node)), []).append(node)
    return found


def _dead(
    module: fx.GraphModule, chosen: list[Computed], looked_up: dict[Region, list[fx.Node]]
) -> set[fx.Node]:
    """The nodes that nothing needs any more once parameters stand in the place of the chosen ones."""
    dead = {node for entry in chosen for node in entry.nodes}
    sources = {key for entry in chosen for key in entry.sources}
    # Further names of tied weights.
    unused = {node for key in sources for node in looked_up[key] if not node.users}
    computing = {node for entry in chosen for node in entry.cone}
    for node in reversed(module.graph.nodes):
        if node.op not in ("call_function", "get_attr") or node in dead:
            continue
        needed = not node.users and not (checks(node) and computing.issuperset(node.all_input_nodes))
        if not needed and all(user in dead for user in node.users):
            dead.add(node)
    return dead | unused


def _chosen(
    module: fx.GraphModule, found: list[Computed], looked_up: dict[Region, list[fx.Node]]
) -> tuple[list[Computed], set[fx.Node]]:
    """Those that take no more bytes than the weights that go, and the nodes that go; of several that are
    computed of one weight, the first has its bytes.
    """
    sizes = {key: _bytes(attribute(module, target_name(nodes[0]))) for key, nodes in looked_up.items()}
    chosen = found
    while True:
        dead = _dead(module, chosen, looked_up)
        freed = {key: size for key, size in sizes.items() if dead.issuperset(looked_up[key])}
        fits = [entry for entry in chosen if entry.bytes <= sum(freed.pop(key, 0) for key in entry.sources)]
        if len(fits) == len(chosen):
            return chosen, dead
        chosen = fits


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --- how


def _evaluate(module: fx.GraphModule, entry: Computed) -> Tensor:
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in entry.cone:
            if node.op == "get_attr":
                values[node] = attribute(module, target_name(node))
            else:
                assert callable(node.target)
                values[node] = node.target(
                    *fx.map_arg(node.args, lambda n: values[n]),
                    **fx.map_arg(node.kwargs, lambda n: values[n]),
                )
        value: Tensor = values[entry.nodes[0]].detach().clone()  # of no other's storage
    return value


def _name(entry: Computed, weights: dict[str, Tensor], gone: set[str]) -> str:
    """The name of the attribute that is parametrised; else that of the one parameter it replaces, or one made
    of the largest's.
    """
    names = list(entry.sources.values())
    for name in names:
        owner, found, rest = f".{name}".partition(_PARAMETRIZED)
        if found:
            return f"{owner}.{rest.partition('.')[0]}".lstrip(".")
    parameters = {name for name in names if isinstance(weights.get(name), nn.Parameter)}
    main = max(names, key=lambda name: (name in gone, name in parameters, _numel(weights.get(name))))
    owner, dot, leaf = main.rpartition(".")
    if leaf.startswith(f"{entry.role}_"):  # weight_v, weight_orig: what a hook makes a weight of
        return f"{owner}{dot}{entry.role}"
    alike = main in weights and weights[main].shape == entry.value.shape
    return main if alike and (leaf == entry.role or parameters == {main}) else f"{main}{_SUFFIX}"


def _numel(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def _free(name: str, taken: set[str]) -> str:
    """The name itself, or with a suffix if something else has it."""
    candidate, count = name, 1
    while any(other == candidate or other.startswith(f"{candidate}.") for other in taken):
        candidate = f"{name.removesuffix(_SUFFIX)}{_SUFFIX}{count if count > 1 else ''}"
        count += 1
    return candidate


def _put(module: fx.GraphModule, entry: Computed, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner).register_parameter(leaf, parameter)
    for node in entry.nodes:
        with module.graph.inserting_before(node):
            made = module.graph.get_attr(name)
        made.meta.update(
            {key: node.meta[key] for key in ("val", "nn_module_stack", "stack_trace") if key in node.meta}
        )
        node.replace_all_uses_with(made)


# --- Weights that a graph computes from parameters alone: where they stand, and what they are computed of.


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
