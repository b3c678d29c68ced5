"""Fold weights that the model computes from parameters in every call into plain parameters, which can be
pruned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx, nn

from ._computed import Computed, Region, checks, computed_weights
from ._fx import attribute, target_name
from ._program import FoldedWeight, region

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
    chosen, dead = _chosen(module, found)
    notes = tuple(_refused(module, entry) for entry in found if entry not in chosen)
    if not chosen:
        return Folding(notes=notes)
    freed = set()
    for key, nodes in _looked_up(module).items():
        if all(node in dead for node in nodes):
            freed.add(key)
        else:
            # Another name of a weight that stays.
            dead.difference_update(node for node in nodes if not node.users)
    weights = dict(
        [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    )
    gone = {name for name, tensor in weights.items() if region(tensor, name) in freed}
    replaced = {name: weights[name] for name in gone}
    taken = (set(order) | set(weights)) - gone
    folds, made = [], []
    for entry in chosen:
        name = _free(module, _name(entry, weights, gone), taken, gone)
        taken.add(name)
        trained = any(attribute(module, source).requires_grad for source in entry.sources.values())
        made.append((entry, name, nn.Parameter(_evaluate(module, entry), requires_grad=trained)))
        folds.append(FoldedWeight(name, tuple(entry.sources.values())))
    for name in gone:
        _delete(module, name)
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


def _chosen(module: fx.GraphModule, found: list[Computed]) -> tuple[list[Computed], set[fx.Node]]:
    """Those that together take no more bytes than the weights that go, and the nodes that go."""
    looked_up = _looked_up(module)
    sizes = {key: _bytes(attribute(module, target_name(nodes[0]))) for key, nodes in looked_up.items()}
    chosen = [entry for entry in found if entry.bytes <= sum(sizes[key] for key in entry.sources)]
    while True:
        dead = _dead(module, chosen, looked_up)
        freed = {key: size for key, size in sizes.items() if all(node in dead for node in looked_up[key])}
        shared = nx.Graph()
        for index, entry in enumerate(chosen):
            shared.add_edges_from((index, ("weight", key)) for key in entry.sources)
        worst = []
        for component in nx.connected_components(shared):
            entries = [chosen[item] for item in component if isinstance(item, int)]
            if sum(entry.bytes for entry in entries) > sum(
                freed.get(key, 0) for key in {key for entry in entries for key in entry.sources}
            ):
                worst.append(
                    max(
                        entries,
                        key=lambda entry: entry.bytes - sum(freed.get(key, 0) for key in entry.sources),
                    )
                )
        if not worst:
            return chosen, dead
        chosen = [entry for entry in chosen if entry not in worst]


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
        value: Tensor = values[entry.nodes[0]].detach()
        shared = {attribute(module, name).untyped_storage()._cdata for name in entry.sources.values()}
        return (
            value.clone()
            if value.untyped_storage()._cdata in shared or value.untyped_storage().nbytes() > _bytes(value)
            else value
        )


def _name(entry: Computed, weights: dict[str, Tensor], gone: set[str]) -> str:
    """The name of the attribute that is parametrised; else that of the one parameter it replaces, or one made
    of the largest's.
    """
    names = list(entry.sources.values())
    for name in names:
        owner, found, rest = f".{name}".partition(_PARAMETRIZED)
        if found:
            return f"{owner}.{rest.partition('.')[0]}".lstrip(".")
    main = max(
        names,
        key=lambda name: (
            name in gone,
            isinstance(weights.get(name), nn.Parameter),
            _numel(weights.get(name)),
        ),
    )
    owner, dot, leaf = main.rpartition(".")
    if leaf.startswith(f"{entry.role}_"):  # weight_v, weight_orig: what a hook makes a weight of
        return f"{owner}{dot}{entry.role}"
    parameters = [name for name in names if isinstance(weights.get(name), nn.Parameter)]
    alike = (
        weights[main].shape == entry.value.shape and (leaf == entry.role or parameters == [main])
        if main in weights
        else False
    )
    return main if alike else f"{main}{_SUFFIX}"


def _numel(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def _free(module: fx.GraphModule, name: str, taken: set[str], gone: set[str]) -> str:
    """The name itself, or with a suffix if something else has it."""

    def has(candidate: str) -> bool:
        if candidate in taken:
            return True
        owner, _, leaf = candidate.rpartition(".")
        return candidate not in gone and hasattr(module.get_submodule(owner), leaf)

    candidate, count = name, 1
    while has(candidate):
        candidate, count = f"{name.removesuffix(_SUFFIX)}{_SUFFIX}{count if count > 1 else ''}", count + 1
    return candidate


def _delete(module: fx.GraphModule, name: str) -> None:
    owner, _, leaf = name.rpartition(".")
    delattr(module.get_submodule(owner), leaf)


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
