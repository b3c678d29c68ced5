"""Give each attention a table of its own, where what several of them share is computed from buffers alone.

All layers of a Llama turn queries and keys by one table of cosines and sines, so that a pair of channels
could go from all layers only, or from none. The table depends on positions and on one buffer of frequencies:
computed for each layer from a copy of the buffer, it gives the same numbers, and each layer can lose the
pairs that matter least to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np
import torch
from torch import Tensor, fx, nn

from fasp_fx.analysis._walks import label_sets, walk_program
from fasp_fx.base._stamps import WRITTEN_BY, stamp
from fasp_fx.capturing._fx import attribute, is_pure, target_name, written_names
from fasp_fx.capturing._program import CopiedBuffer, Program

from ._pieces import delete_unread, numbers_of

if TYPE_CHECKING:
    from fasp_fx.analysis._analysis import Analysis

#: of the pass, in messages and stamps
NAME = "unshare_tables"
#: copies may take this much of what all weights take
_ROOM = 0.02

#: a node of a table, and one outside that reads it
_Reading = tuple[fx.Node, fx.Node]


def unshare(program: Program, analysis: Analysis) -> Program:
    """Copy the tables that alone couple groups which are read by no weight, for each of these groups.

    Precondition: the analysis is that of the program. Postcondition: no two such groups, if they are to be
    pruned, are coupled by a table alone; the copies of buffers bear the name of the first weight of their
    group, and are recorded in ``program.copies``. Tables that are large beside the weights stay shared.
    """
    tables = _tables(analysis)
    if not tables:
        return program
    readings = [
        (node, user)
        for node in tables
        for user in node.users
        if user not in tables and numbers_of(analysis, user).size
    ]
    sharing = _sharing(program, analysis, tables, readings)
    held = sum(
        attribute(program.module, target_name(node)).numel() for node in tables if node.op == "get_attr"
    )
    if not sharing or len(sharing) * held > _ROOM * sum(map(Tensor.numel, program.weights().values())):
        return program
    return _copied(program, analysis, tables, sharing)[0]


def share_again(program: Program) -> Program:
    """Compute copies of a table that are left with the same channels once; the same program if there are
    none.

    What it returns computes what it is given computes, and has no channel numbers that an analysis of before
    could follow.
    """
    if not program.copies:
        return program
    program = program.copy()
    graph, sources = program.module.graph, {copied.name: copied.source for copied in program.copies}
    held: list[tuple[str, Tensor, fx.Node]] = []
    seen: dict[tuple[object, ...], fx.Node] = {}
    for node in [node for node in graph.nodes if node.meta.get(WRITTEN_BY) == NAME]:
        if node.op == "get_attr":
            source, value = sources[target_name(node)], attribute(program.module, target_name(node))
            same = next(
                (
                    other
                    for name, known, other in held
                    if name == source and known.shape == value.shape and torch.equal(known, value)
                ),
                None,
            )
            if same is None:
                held.append((source, value, node))
        else:
            key = (node.target, str(node.args), str(node.kwargs))
            same = seen.setdefault(key, node)
        if same is not None and same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    delete_unread(program, sources.keys())
    left = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    program.copies = tuple(copied for copied in program.copies if copied.name in left)
    program.module.recompile()
    return program


def _tables(analysis: Analysis) -> dict[fx.Node, None]:
    """The nodes that carry channels of groups which no weight reads, and carry them from buffers alone, in
    graph order.
    """
    sets = [group.sets for group in analysis.groups if group.status in analysis.include and not group.uses]
    if not sets:
        return {}
    wanted, written = np.concatenate(sets), set(written_names(analysis.program.module.graph))
    found: dict[fx.Node, None] = {}
    for node in analysis.program.module.graph.nodes:
        if not np.isin(analysis.labels[numbers_of(analysis, node)], wanted).any():
            continue
        if node.op == "get_attr":
            if target_name(node) not in written and not isinstance(
                attribute(analysis.program.module, target_name(node)), nn.Parameter
            ):
                found[node] = None
        elif (
            node.op == "call_function"
            and is_pure(node)
            and all(read in found or not numbers_of(analysis, read).size for read in node.all_input_nodes)
        ):
            found[node] = None
    return found


def _sharing(
    program: Program, analysis: Analysis, tables: Iterable[fx.Node], readings: list[_Reading]
) -> dict[str, list[_Reading]]:
    """Which readings must go on sharing a table since something else couples them, by the first weight that
    they are coupled with; nothing if all must.
    """
    apart, copies = _copied(
        program, analysis, tables, {str(index): [reading] for index, reading in enumerate(readings)}
    )
    numbering, walk = walk_program(replace(apart, numbers={}), False, False)
    labels = label_sets(numbering.total, walk.facts.pairs)
    coupled = nx.Graph()
    weights: dict[int, str] = {}
    of_copy = {name: index for index, names in copies.items() for name in names}
    for slot in numbering.slots:
        for label in np.unique(labels[slot.numbers().numpy()]).tolist():
            if slot.name in of_copy:
                coupled.add_edge(of_copy[slot.name], label)
            elif slot.kind == "weight":
                weights[label] = min(weights.get(label, slot.name), slot.name)
    found: dict[str, list[_Reading]] = {}
    for component in nx.connected_components(coupled):
        first = min((weights[label] for label in component if label in weights), default="")
        found.setdefault(first, []).extend(
            readings[int(index)] for index in sorted(item for item in component if isinstance(item, str))
        )
    held = _families(tables)
    families = [{held[node] for node, _ in together} for together in found.values()]
    return found if any(a & b for index, a in enumerate(families) for b in families[:index]) else {}


def _families(tables: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """Which nodes of tables hang together."""
    graph = nx.Graph()
    for node in tables:
        graph.add_node(node)
        graph.add_edges_from((node, read) for read in node.all_input_nodes if read in graph)
    return {node: number for number, family in enumerate(nx.connected_components(graph)) for node in family}


def _copied(
    program: Program, analysis: Analysis, tables: Iterable[fx.Node], parties: Mapping[str, list[_Reading]]
) -> tuple[Program, dict[str, set[str]]]:
    """A program in which the readings of each party read copies of the tables, made for them; and the names
    of the buffers copied for each.
    """
    program = program.copy()
    names: dict[str, set[str]] = {}
    graph = program.module.graph
    nodes = {node.name: node for node in graph.nodes}
    originals = [nodes[node.name] for node in tables]
    for first, party in parties.items():
        names[first] = set()
        read: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node, user in party:
            read[nodes[node.name]].append(nodes[user.name])
        needed = _upstream(read, originals)
        copies: dict[fx.Node, fx.Node] = {}
        for node in (node for node in originals if node in needed):
            with graph.inserting_after(node):
                if node.op == "get_attr":
                    names[first].add(name := _copy_buffer(program, analysis, target_name(node), first))
                    made = stamp(graph.get_attr(name), NAME, like=node)
                    made.meta["val"] = node.meta.get("val")
                else:
                    made = stamp(graph.node_copy(node, partial(_instead, copies)), NAME)
            copies[node] = made
        for node, users in read.items():
            for user in users:
                user.replace_input_with(node, copies[node])
    _remove_unread(graph, originals)
    return program, names


def _remove_unread(graph: fx.Graph, tables: list[fx.Node]) -> None:
    """Remove nodes of tables that nothing reads any more but assertions of theirs."""
    inside = set(tables)
    for node in reversed(tables):
        readers = [user for user in node.users if user not in inside and (user.users or user.op == "output")]
        if readers or any(user in inside for user in node.users):
            continue
        for user in list(node.users):
            graph.erase_node(user)
        graph.erase_node(node)


def _instead(copies: Mapping[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    """The copy of a node, where there is one."""
    return copies.get(node, node)


def _upstream(read: Iterable[fx.Node], within: list[fx.Node]) -> set[fx.Node]:
    inside, found, pending = set(within), set(), list(read)
    while pending:
        node = pending.pop()
        if node in inside and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _copy_buffer(program: Program, analysis: Analysis, source: str, first: str) -> str:
    """Register a copy of a buffer beside it; to the verifier its channels are those of the buffer."""
    name = program.free_name(f"{source}_of_{first.replace('.', '_')}")
    path, _, leaf = name.rpartition(".")
    owner = attribute(program.module, path) if path else program.module
    persistent = source.rpartition(".")[2] not in owner._non_persistent_buffers_set
    copy = attribute(program.module, source).detach().clone()
    owner.register_buffer(leaf, copy, persistent=persistent)
    program.numbers[name] = [analysis.numbering.numbers(source, dim) for dim in range(copy.dim())]
    program.copies = (*program.copies, CopiedBuffer(name, source))
    program.recipes[name] = program.recipe(source)
    return name
