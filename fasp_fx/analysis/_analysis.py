"""Find the coupled groups of a program. Pure: reads a program, returns groups with a reason for
each status.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product

import networkx as nx
import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx

from fasp_fx.base import Page, pytree, without_collections
from fasp_fx.capturing import Program, target_name
from fasp_fx.errors import ArgumentError

from ._build_groups import (
    CODE,
    ChannelSets,
    GroupBuilder,
    find_blocks,
    group_sets,
    needed_experts,
    torn_blocks,
)
from ._depth import DEPTH, let_blocks_go
from ._groups import EXEMPT, FROZEN, Coupling
from ._resources import Sparsity
from .channels import Interpreter, Numbering, Pairs, Slot, Value, Walk, marked


@dataclass(repr=False)
class Analysis(Page, Coupling):
    """The coupled groups of one program, and what can be asked of them.

    Examples:
        >>> print(f"{analysis.max_sparsity:.0%}")  # the most that can be removed
        98%
        >>> analysis.explain("2.weight", "4.weight")  # the way through the graph that couples them
        ['2.weight', 'linear_1 = aten.linear.default', ..., 'linear_2 = aten.linear.default', '4.weight']
    """

    @property
    def max_sparsity(self) -> float:
        """The highest sparsity that can be asked for with ``round_to=1`` (see
        :class:`fasp_fx.analysis.Sparsity`).
        """
        return Sparsity(self).reach(1)

    def explain(self, first: str, second: str | None = None) -> list[str]:
        """The path of graph nodes that couples channels of two weights, from ``first`` to ``second``; or what
        can be pruned of one weight, and why not the rest.

        Returns:
            One line per node of a shortest path; or per group that has channels of the one weight.

        Raises:
            ArgumentError: a name is not a weight of the model, or no channel of one weight is coupled with a
                channel of the other.
        """
        starts, ends = _nodes_of(self, first), _nodes_of(self, second or first)
        if second is None:
            return [str(group) for group in self.groups if first in group.names] or [
                f"no operator that has a rule reads '{first}'"
            ]
        # What can be pruned says most; the channel sets of a group go the same ways.
        for group in sorted(self.groups, key=lambda group: CODE[group.status]):
            graph = _carriers(self, int(group.sets[0])) if {first, second} <= group.names else nx.Graph()
            pairs = [pair for pair in product(starts, ends) if {*pair} <= graph.nodes]
            paths = [nx.shortest_path(graph, *pair) for pair in pairs if nx.has_path(graph, *pair)]
            if paths:
                return [
                    str(node.target) if node.op == "get_attr" else f"{node.name} = {node.target}"
                    for node in min(paths, key=len)
                ]
        raise ArgumentError(
            f"no way through the graph couples channels of '{first}' with channels of '{second}';"
            " analysis.groups says with which weights each is"
        )


@without_collections()
def analyze_program(
    program: Program,
    split: Callable[[Program, Analysis], Program | None] | None = None,
    granularity: Iterable[str] = ("channel",),
    include: Iterable[str] = (),
) -> Analysis:
    """Analyse a captured program; if ``split`` is given, let it split fused producers that a layout ties
    together, and analyse again.
    """
    asked = frozenset(granularity), frozenset(include)
    # Channel numbers are for the CPU, whatever the default device is; being told so delays every call.
    with contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        analysis = _analyze(program, *asked)
        while split is not None and analysis.conflicts:
            # Rows are told apart one by one.
            alone = analysis if "head" not in asked[0] else _analyze(program, asked[0] - {"head"}, asked[1])
            if (rewritten := split(program, alone)) is None:
                break
            program, analysis = rewritten, _analyze(rewritten, *asked)
        return replace(analysis, groups=let_blocks_go(analysis)) if DEPTH in asked[1] else analysis


def _analyze(program: Program, granularity: frozenset[str], include: frozenset[str]) -> Analysis:
    numbering, walk = walk_program(program, granularity)
    labels = label_sets(numbering.total, walk.facts.pairs)
    labels.setflags(write=False)
    expert = needed_experts(labels, walk) * ("expert" in granularity)
    judged = ChannelSets.of(labels, expert, EXEMPT in include, walk, program)
    for slot, sets in torn_blocks(numbering, labels):
        judged.freeze(sets, f"they are whole blocks of {slot}, which keep equal counts")
    group_of, keys = group_sets(judged, numbering, walk)
    layout = np.where(judged.status == CODE[FROZEN], -1, group_of)
    block, conflicts = find_blocks(walk.facts.boxes.values(), labels, layout)
    for conflict in conflicts:
        where = f"{conflict.node.name} = {conflict.node.target}"
        judged.freeze(conflict.classes, f"equal counts cannot be kept in {where}")
    if conflicts:
        group_of, keys = group_sets(judged, numbering, walk)
    groups = GroupBuilder(judged, block, numbering, walk, program).groups(group_of, keys)
    real = [conflict for conflict in conflicts if not judged.spared[conflict.classes].all()]
    return Analysis(program, groups, real, labels, numbering, walk, granularity, include)


# --- Interpret a program on channel numbers, as often as it takes until weights are numbered in the blocks
# that the graph asks for.


def walk_program(program: Program, granularity: frozenset[str]) -> tuple[Numbering, Walk]:
    """Interpret the program, again where a weight is better numbered block by block or some channels go
    together.
    """
    blocked, stretched = _cached_heads(program), set[tuple[str, int]]()
    while True:
        numbering = Numbering(blocked, stretched)
        walk = Interpreter(program, numbering, granularity).run()
        wishes = walk.facts.wishes
        if wishes.blocks.keys() <= blocked.keys() and wishes.stretched <= stretched:
            break
        blocked, stretched = {**wishes.blocks, **blocked}, stretched | wishes.stretched
    walk.facts.pairs += _columns_of_parts(program, numbering)
    in_heads, coupled = _numbered(wishes.heads), _numbered(wishes.heads + wishes.together)
    coupled += _same_elsewhere(coupled, walk.facts.pairs, numbering.total) if coupled else []
    before, again = -1, granularity - {"head"}
    while coupled and (sets := int(label_sets(numbering.total, coupled).max())) != before:
        # What goes together along one dimension may have to along the next.
        walk, before = _walk_together(program, numbering, coupled, coupled, again), sets
        coupled = coupled + _numbered(walk.facts.wishes.together)
    if coupled:
        walk = _walk_together(program, numbering, coupled, walk.facts.pairs, again)
    walk.facts.wishes.heads = in_heads
    return numbering, walk


def _cached_heads(program: Program) -> dict[tuple[str, int], tuple[int, int]]:
    """A cache ``[batch, heads, length, width]`` may lose other channels in each head, as the weights that
    fill it may.
    """
    blocks: dict[tuple[str, int], tuple[int, int]] = {}
    for node in program.placeholders():
        value = node.meta.get("val")
        if node.name in program.state_inputs and isinstance(value, Tensor) and value.dim() == 4:
            _, heads, length, width = value.shape
            static = [isinstance(size, int) for size in (heads, length, width)]
            if static == [True, False, True] and heads > 1:
                blocks[(node.name, 3)] = (1, int(heads))
    return blocks


def _columns_of_parts(program: Program, numbering: Numbering) -> Pairs:
    """The columns of weights that are rows of one go together, as the plan names them by that one."""
    nodes = {node.target: node for node in program.module.graph.find_nodes(op="get_attr")}
    first: dict[tuple[str, int], Slot] = {}
    pairs: Pairs = []
    for slot in (slot for slot in numbering.slots if slot.name in program.parts and slot.name in nodes):
        part = program.parts[slot.name]
        if slot.dim != part.dim:
            leader = first.setdefault((part.source, slot.dim), slot)
            one, other = (each.numbers().reshape(-1).numpy() for each in (leader, slot))
            pairs.append((one, other, nodes[slot.name]))
    return pairs


def _numbered(pairs: Pairs) -> Pairs:
    return [(a[both], b[both], node) for a, b, node in pairs if (both := (a >= 0) & (b >= 0)).any()]


def _same_elsewhere(coupled: Pairs, pairs: Pairs, total: int) -> Pairs:
    """The pairs that couple one to one what goes together with what has other numbers, such as the keys of a
    cache with those that join them.

    Positions that several channels share, such as the angles by which all heads are turned, need not go with
    a whole head.
    """
    together = marked(total, *(side for pair in coupled for side in pair[:2]))
    others: Pairs = []
    for a, b, node in _numbered(pairs):
        span = int(b.max()) + 1
        first, second = np.divmod(np.unique(a * span + b), span)
        one_to_one = len(np.unique(first)) == len(np.unique(second)) == len(first)
        if one_to_one and not np.array_equal(first, second) and (together[first] | together[second]).any():
            others.append((first, second, node))
    return others


def _walk_together(
    program: Program, numbering: Numbering, coupled: Pairs, pairs: Pairs, granularity: frozenset[str]
) -> Walk:
    """Interpret with one number for all channels that ``coupled`` puts together, and those that ``pairs``
    couples with them.
    """
    everyone, labels = np.arange(numbering.total), label_sets(numbering.total, pairs)
    within = marked(numbering.total, *(labels[each] for _, each, _ in coupled))
    _, first = np.unique(labels, return_index=True)  # the lowest number of each set
    speaking = np.where(within[labels], first[labels], everyone)
    numbering.representative = torch.from_numpy(speaking)
    walk = Interpreter(program, numbering, granularity).run()
    spoken_for = np.flatnonzero(speaking != everyone)
    walk.facts.pairs.append((spoken_for, speaking[spoken_for], coupled[0][2]))
    return walk


def label_sets(total: int, pairs: Pairs) -> np.ndarray:
    """The channel set of each of ``total`` channel numbers: the connected components of what is coupled."""
    none = np.zeros(0, dtype=np.int64)
    first, second = (np.concatenate([none, *(pair[side] for pair in pairs)]) for side in (0, 1))
    graph = coo_matrix((np.ones(len(first)), (first, second)), shape=(total, total))
    return connected_components(graph, directed=False)[1].astype(np.int64)


# --- Why two weights are coupled.


def _nodes_of(analysis: Coupling, name: str) -> list[fx.Node]:
    """The nodes that give a weight of the caller's, or its parts."""
    program = analysis.program
    canonical = program.canonical()
    wanted = {canonical.get(name), *(new for new, part in program.parts.items() if part.source == name)}
    read = program.module.graph.find_nodes(op="get_attr")
    nodes = [node for node in read if canonical.get(target_name(node)) in wanted - {None}]
    if not nodes:
        raise ArgumentError(
            f"'{name}' is not a weight that the model reads; names are those of model.named_parameters()"
        )
    return nodes


def _carriers(analysis: Coupling, chosen: int) -> nx.Graph:
    """The nodes whose tensors hold this channel set, and those that read them."""
    graph = nx.Graph()
    for node, value in analysis.walk.values.items():
        values = [item for item in pytree.tree_leaves(value) if isinstance(item, Value)]
        several = [axis.numbers.numpy() for item in values for axis in item.axes]
        if any((analysis.labels[numbers[numbers >= 0]] == chosen).any() for numbers in several):
            graph.add_edges_from((node, user) for user in node.users if user.op == "call_function")
    return graph
