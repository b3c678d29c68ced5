"""Find the coupled groups of a program. Pure: reads a program, returns groups with a reason for each status."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx

from ._experts import last_products, needed_experts
from ._layout import Conflict, find_blocks
from ._program import Program
from .channels import Axis, Interpreter, Numbering, Remark, Slot, Value, Walk, attribute, target_name
from .errors import ArgumentError
from .groups import APPROXIMATE, EXEMPT, FROZEN, PRUNABLE, Group, Member
from .patterns import find_composites

LAYOUT = "layout"


@dataclass
class Analysis:
    """The coupled groups of one program.

    Attributes:
        program: the captured program, with fused producers split where a layout demanded it.
        groups: all groups, in graph order.
        conflicts: tensors whose layout stands in the way (their groups are frozen with reason ``layout``).
        labels: the channel set of each channel number.
        granularity, include: as for :func:`fasp_fx.prune`.
        known: how many of the channel numbers are those of ``program``, where a pass has brought weights with numbers of their own; ``None``: all.
        experts: whether the numbers by which routers name experts were followed.
    """

    program: Program
    groups: list[Group]
    conflicts: list[Conflict]
    labels: np.ndarray
    numbering: Numbering
    walk: Walk
    granularity: frozenset[str] = frozenset({"channel"})
    include: frozenset[str] = frozenset()
    known: int | None = None
    experts: bool = False

    def fresh(self) -> np.ndarray:
        """The channel sets that only weights brought by a pass have."""
        return np.setdiff1d(self.labels[self.known :], self.labels[: self.known]) if self.known is not None else np.zeros(0, dtype=np.int64)

    @property
    def chosen(self) -> list[Group]:
        """The groups that are pruned: prunable ones and those asked for, at the granularities asked for."""
        return [group for group in self.groups if (group.status == PRUNABLE or group.status in self.include) and group.granularity in self.granularity]

    def select(self, status: str) -> list[Group]:
        """The groups of one status."""
        return [group for group in self.groups if group.status == status]

    @property
    def max_sparsity(self) -> float:
        """The highest sparsity that can be asked for with ``round_to=1`` (see :mod:`fasp_fx.allocation`)."""
        from .allocation import Budget

        return Budget(self).reach(1)

    @cached_property
    def without_rule(self) -> dict[str, int]:
        """Operators that had no rule and froze what they touched, with the number of times each stands in the graph."""
        return {name: len(nodes) for name, nodes in sorted(self.walk.without_rule.items())}

    def to_html(self, title: str = "Model") -> str:
        """The groups as one page of HTML that needs nothing else: what can be pruned, what cannot, and why (see :meth:`fasp_fx.Report.to_html`)."""
        from ._page import page

        return page(self, title)

    def graph(self) -> nx.DiGraph:
        """Weights and groups as a directed graph: producer → group → consumer; nodes carry ``kind`` and ``status``."""
        graph = nx.DiGraph()
        for group in self.groups:
            vertex = ("group", group.name)
            graph.add_node(vertex, kind="group", status=group.status, size=group.size, reason=group.reason)
            for member in group.producers:
                graph.add_node(("weight", member.name), kind="weight")
                graph.add_edge(("weight", member.name), vertex, dim=member.dim)
            for member in group.consumers:
                graph.add_node(("weight", member.name), kind="weight")
                graph.add_edge(vertex, ("weight", member.name), dim=member.dim)
        return graph

    def explain(self, first: str, second: str) -> list[str]:
        """The path of graph nodes that couples channels of two weights, from ``first`` to ``second``.

        Returns:
            One line per node of a shortest path; empty if no channel of one is coupled with a channel of the other.

        Raises:
            ArgumentError: a name is not a weight of the model.
        """
        starts, ends = self._names_of(first), self._names_of(second)
        status = {int(chosen): _CODE[group.status] for group in self.groups for chosen in group.sets}
        shared = self._sets_of(starts) & self._sets_of(ends)
        canonical = self.program.canonical()
        for chosen in sorted(shared, key=lambda chosen: (status.get(chosen, len(_CODE)), chosen)):  # what can be pruned says most
            graph = self._carriers(chosen)
            held = {node: canonical[target_name(node)] for node in graph if node.op == "get_attr"}
            paths = [
                nx.shortest_path(graph, source, target)
                for source in held
                for target in held
                if held[source] in starts and held[target] in ends and nx.has_path(graph, source, target)
            ]
            if paths:
                return [_describe(node) for node in min(paths, key=len)]
        return []

    def _names_of(self, name: str) -> set[str]:
        """The names under which the analysis knows a weight of the caller's: its own, or those of its parts."""
        canonical = self.program.canonical()
        found = {canonical[name]} if name in canonical else {new for new, part in self.program.parts.items() if part.name == name}
        if not found:
            raise ArgumentError(f"'{name}' is not a weight of the model; names are those of model.named_parameters()")
        return found

    def _sets_of(self, names: set[str]) -> set[int]:
        return {int(s) for slot in self.numbering.slots if slot.name in names for s in np.unique(self.labels[slot.base : slot.base + slot.size])}

    def _carriers(self, chosen: int) -> nx.Graph:
        """The nodes whose tensors hold this channel set, and the contractions that consume it."""
        graph = nx.Graph()
        consumers = {use.node for use in self.walk.facts.uses}
        holding = {node for node, value in self.walk.values.items() if any(self._holds(axis, chosen) for axis in _axes(value))}
        for node in self.walk.values:
            for source in node.all_input_nodes:
                if source in holding and (node in holding or node in consumers or node.op == "call_function"):
                    graph.add_edge(source, node)
        return graph

    def _holds(self, axis: Axis, chosen: int) -> bool:
        numbers = axis.numbers.reshape(-1).numpy()
        return bool((self.labels[numbers[numbers >= 0]] == chosen).any())


def _axes(value: Any) -> list[Axis]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [axis for item in values if isinstance(item, Value) for axis in item.axes]


def _describe(node: fx.Node) -> str:
    return f"{node.target}" if node.op == "get_attr" else f"{node.name} = {node.target}"


def analyze_program(
    program: Program,
    split: Callable[[Program, Analysis], Program | None] | None = None,
    granularity: Iterable[str] = ("channel",),
    include: Iterable[str] = (),
) -> Analysis:
    """Analyse a captured program; if ``split`` is given, let it split fused producers that a layout ties together, and analyse again."""
    heads, experts, exempt = "head" in granularity, "expert" in granularity, EXEMPT in include
    analysis = _analyze(program, heads, experts, exempt)
    while split is not None and analysis.conflicts:
        rewritten = split(program, _analyze(program, False, experts, exempt) if heads else analysis)  # rows are told apart one by one
        if rewritten is None:
            break
        program, analysis = rewritten, _analyze(rewritten, heads, experts, exempt)
    return replace(analysis, granularity=frozenset(granularity), include=frozenset(include))


Pairs = list[tuple[np.ndarray, np.ndarray, fx.Node]]


def _walk(program: Program, heads: bool, experts: bool) -> tuple[Numbering, Walk]:
    """Interpret the program, again where a weight is better numbered block by block or some channels go together."""
    blocked = _cached_heads(program)
    stretched: set[tuple[str, int]] = set()
    while True:
        numbering = Numbering(blocked, stretched)
        walk = _interpret(program, numbering, heads, experts)
        if walk.facts.blocks.keys() <= blocked.keys() and walk.facts.stretched <= stretched:
            break
        blocked = {**walk.facts.blocks, **blocked}
        stretched |= walk.facts.stretched
    in_heads, coupled = _numbered(walk.facts.heads), _numbered(walk.facts.heads + walk.facts.together)
    before = -1
    while coupled and (sets := int(_label(numbering.total, coupled).max())) != before:  # what goes together along one dimension may have to along the next
        walk, before = _walk_together(program, numbering, coupled, coupled, experts), sets
        coupled = coupled + _numbered(walk.facts.together)
    if coupled:
        walk = _walk_together(program, numbering, coupled, walk.facts.pairs, experts)
    walk.facts.heads = in_heads
    return numbering, walk


def _cached_heads(program: Program) -> dict[tuple[str, int], tuple[int, int]]:
    """A cache ``[batch, heads, length, width]`` may lose other channels in each head, as the weights that fill it may."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for node in program.placeholders():
        value = node.meta.get("val")
        if node.name in program.state_inputs and isinstance(value, Tensor) and value.dim() == 4:
            heads, width = value.shape[1], value.shape[3]
            if isinstance(heads, int) and isinstance(width, int) and not isinstance(value.shape[2], int) and heads > 1:
                found[(node.name, 3)] = (1, heads)
    return found


def _numbered(pairs: Pairs) -> Pairs:
    return [(a[both], b[both], node) for a, b, node in pairs if (both := (a >= 0) & (b >= 0)).any()]


def _walk_together(program: Program, numbering: Numbering, coupled: Pairs, pairs: Pairs, experts: bool) -> Walk:
    """Interpret with one number for all channels that ``coupled`` puts together, and those that ``pairs`` couples with them."""
    everyone = np.arange(numbering.total)
    labels = _label(numbering.total, pairs)
    within = np.isin(labels, np.unique(labels[np.concatenate([numbers for _, numbers, _ in coupled])]))
    speaking = np.where(within, np.unique(labels, return_index=True)[1][labels], everyone)
    numbering.representative = torch.from_numpy(speaking)
    walk = _interpret(program, numbering, False, experts)
    spoken_for = np.flatnonzero(speaking != everyone)
    walk.facts.pairs.append((spoken_for, speaking[spoken_for], coupled[0][2]))
    return walk


def _interpret(program: Program, numbering: Numbering, heads: bool, experts: bool) -> Walk:
    return Interpreter(program.module, numbering, program.canonical(), program.state_inputs, program.state_outputs, heads=heads, experts=experts).run()


def _analyze(program: Program, heads: bool, experts: bool, exempt: bool) -> Analysis:
    numbering, walk = _walk(program, heads, experts)
    labels = _label(numbering.total, walk.facts.pairs)
    labels.setflags(write=False)
    count = int(labels.max(initial=-1)) + 1
    expert = needed_experts(labels, count, walk) if experts else np.zeros(count, dtype=np.int64)
    status, reason = _status(labels, count, expert, exempt, walk, program)
    spared = np.full(count, not exempt) & (status == _CODE[EXEMPT])
    group_of, keys = _grouping(labels, count, status, reason, numbering, walk)
    block, conflicts = find_blocks(list(walk.facts.boxes.values()), labels, np.where(status == _CODE[FROZEN], -1, group_of))
    for conflict in conflicts:
        # An exempt group is not pruned unless asked; its status says more than its layout.
        stuck = conflict.classes[~spared[conflict.classes]]
        status[stuck] = _CODE[FROZEN]
        for chosen in stuck:
            reason[chosen] = f"{LAYOUT}: equal counts cannot be kept in {conflict.node.name} = {conflict.node.target}"
    if conflicts:
        group_of, keys = _grouping(labels, count, status, reason, numbering, walk)
    groups = _build(labels, group_of, keys, block, status, reason, expert, exempt, numbering, walk, program)
    real = [c for c in conflicts if not spared[c.classes].all()]
    return Analysis(program, groups, real, labels, numbering, walk, experts=experts)


_CODE = {PRUNABLE: 0, APPROXIMATE: 1, FROZEN: 2, EXEMPT: 3}
_STATUS = {code: name for name, code in _CODE.items()}


def _label(total: int, pairs: Pairs) -> np.ndarray:
    first = np.concatenate([a for a, _, _ in pairs]) if pairs else np.zeros(0, dtype=np.int64)
    second = np.concatenate([b for _, b, _ in pairs]) if pairs else np.zeros(0, dtype=np.int64)
    graph = coo_matrix((np.ones(len(first), dtype=np.int8), (first, second)), shape=(total, total))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _status(labels: np.ndarray, count: int, expert: np.ndarray, exempt: bool, walk: Walk, program: Program) -> tuple[np.ndarray, np.ndarray]:
    """A status code and a reason for each channel set; an exemption outweighs freezing (unless what is exempt is to be pruned), freezing outweighs mixing.

    What a router does to experts, and sums in which those that it never chooses are zero, leaves those that stay as they are.
    """
    composites = find_composites(program.module.graph)
    status = np.full(count, _CODE[PRUNABLE], dtype=np.int8)
    reason = np.full(count, "", dtype=object)

    def mark(remarks: list[Remark], code: str) -> None:
        for remark in reversed(remarks):  # the first remark in graph order is the one shown
            sets = np.unique(labels[remark.numbers])
            sets = sets[expert[sets] == 0] if remark.routing else sets
            status[sets] = _CODE[code]
            inside = composites.get(remark.node) if remark.node is not None else None
            reason[sets] = f"{remark.reason} of {inside}" if inside else remark.reason

    if exempt:
        mark(walk.facts.exempt, EXEMPT)
    mark(walk.facts.mixed, APPROXIMATE)
    mark(walk.facts.frozen, FROZEN)
    if not exempt:
        mark(walk.facts.exempt, EXEMPT)
    return status, reason


def _grouping(
    labels: np.ndarray, count: int, status: np.ndarray, reason: np.ndarray, numbering: Numbering, walk: Walk
) -> tuple[np.ndarray, dict[int, tuple[frozenset[int], frozenset[int]]]]:
    """The group of each channel set: those with the same status, slots and uses; and per group its slots and uses."""
    group_of = np.unique(np.stack([status, np.char.startswith(reason.astype(str), LAYOUT)]), axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)
    offset = len(numbering.slots)
    items = [np.unique(labels[slot.base : slot.base + slot.size]) for slot in numbering.slots]
    items += [np.unique(labels[use.columns[use.columns >= 0]]) for use in walk.facts.uses]
    fresh = int(group_of.max(initial=-1)) + 1
    for sets in items:  # partition refinement: two sets stay together as long as every item holds both or neither
        _, finer = np.unique(group_of[sets], return_inverse=True)
        group_of[sets] = fresh + finer
        fresh += int(finer.max(initial=-1)) + 1
    _, first, group_of = np.unique(group_of, return_index=True, return_inverse=True)
    touching: dict[int, list[int]] = {index: [] for index in range(len(first))}
    representative = np.full(count, -1, dtype=np.int64)
    representative[first] = np.arange(len(first))
    for item, sets in enumerate(items):
        held = representative[sets]
        for index in held[held >= 0]:
            touching[int(index)].append(item)
    keys = {index: (frozenset(i for i in found if i < offset), frozenset(i - offset for i in found if i >= offset)) for index, found in touching.items()}
    return group_of, keys


def _build(
    labels: np.ndarray,
    group_of: np.ndarray,
    keys: dict[int, tuple[frozenset[int], frozenset[int]]],
    block: np.ndarray,
    status: np.ndarray,
    reason: np.ndarray,
    expert: np.ndarray,
    exempt: bool,
    numbering: Numbering,
    walk: Walk,
    program: Program,
) -> list[Group]:
    index_of = {(slot.name, slot.dim): index for index, slot in enumerate(numbering.slots)}
    produces = {index_of[slot] for _, slot in walk.facts.produced if slot in index_of}
    computed = [numbers for numbers, slot in walk.facts.produced if slot is None]
    if computed:
        flat = np.unique(np.concatenate(computed))
        produces |= set(numbering.slot_ids(flat[flat >= 0]).tolist())
    consumes = {index_of[slot] for use in walk.facts.uses for slot in use.slots}
    positions = {node: index for index, node in enumerate(program.module.graph.nodes)}
    order = np.argsort(group_of, kind="stable")
    bounds = np.searchsorted(group_of[order], np.arange(len(keys) + 1))
    numbers_by_label = np.argsort(labels, kind="stable")
    label_bounds = np.searchsorted(labels[numbers_by_label], np.arange(len(group_of) + 1))
    headed = np.unique(labels[np.concatenate([numbers for _, numbers, _ in walk.facts.heads])]) if walk.facts.heads else np.zeros(0, dtype=np.int64)
    products = [product.numbers for product in walk.facts.products] if exempt else []
    multiplied = np.unique(labels[np.concatenate(products)]) if products else np.zeros(0, dtype=np.int64)
    parameters = {program.parts[name].name if name in program.parts else name for name, _ in program.module.named_parameters(remove_duplicate=False)}
    found: list[tuple[Any, Group]] = []
    for index, (slot_ids, use_ids) in keys.items():
        members = order[bounds[index] : bounds[index + 1]]
        _, inverse = np.unique(block[members], return_inverse=True)
        sizes = np.bincount(inverse.reshape(-1))
        for size in np.unique(sizes):  # blocks of unequal size are groups of their own
            sets = members[sizes[inverse.reshape(-1)] == size]
            numbers = np.concatenate([numbers_by_label[label_bounds[s] : label_bounds[s + 1]] for s in sets])
            own = numbering.slot_ids(numbers)
            slots = [numbering.slots[i] for i in sorted(slot_ids)]
            rows = _members(
                [(s, numbers[own == i]) for i, s in zip(sorted(slot_ids), slots) if s.kind == "weight" and (i in produces or i not in consumes)],
                program,
            )
            columns = _members([(s, numbers[own == i]) for i, s in zip(sorted(slot_ids), slots) if i in consumes], program)
            uses = tuple(walk.facts.uses[i] for i in sorted(use_ids))
            if expert[sets].all():
                uses = (*uses, *last_products(labels, sets, walk))
                taking = {use.weight for use in uses}
                held = [(s, numbers[own == i]) for i, s in zip(sorted(slot_ids), slots) if s.kind == "weight"]
                rows = _members([item for item in held if item[0].name not in taking], program)
                columns = _members([item for item in held if item[0].name in taking], program)
            code, why = _STATUS[int(status[sets[0]])], str(reason[sets[0]])
            if not uses and code in (PRUNABLE, APPROXIMATE) and not np.isin(sets, multiplied).all():
                if not any(i in produces for i in slot_ids):
                    continue  # a dimension that nothing in the graph speaks of
                code, why = FROZEN, "no weight consumes these channels"
            if size == 1 and (code in (PRUNABLE, APPROXIMATE) or (exempt and code == EXEMPT)):
                code, why = FROZEN, f"{LAYOUT}: one channel set takes the whole of a dimension"
            if not any(member.name in parameters for member in (*rows, *columns)):
                continue  # positions of buffers alone
            # Frozen channels need no layout: they are shown as one block.
            own_blocks = len(np.unique(block[sets])) if code != FROZEN else 1
            granularity = "expert" if expert[sets].all() else "head" if np.isin(sets, headed).all() else "channel"
            needed = int(expert[sets].max()) if granularity == "expert" else 1
            if code == PRUNABLE and size <= needed:
                code, why = FROZEN, f"each token is sent to {needed} of them"
            group = Group("", len(sets), own_blocks, code, why, tuple(rows), tuple(columns), sets, block[sets], granularity, needed, uses, tuple(slots))
            at = min((positions[use.node] for use in uses), default=len(positions))
            found.append(((at, int(numbers.min())), group))
    return _named([group for _, group in sorted(found, key=lambda item: item[0])])


def _members(slots: list[tuple[Slot, np.ndarray]], program: Program) -> list[Member]:
    """One member per weight of the caller's; the parts of a split one are shown together."""
    merged: dict[tuple[str, int], Member] = {}
    for slot, numbers in slots:
        member = _member(slot, numbers, program)
        before = merged.get((member.name, member.dim))
        indices = member.indices if before is None else tuple(sorted({*before.indices, *member.indices}))
        merged[(member.name, member.dim)] = replace(member, indices=indices)
    return list(merged.values())


def _member(slot: Slot, numbers: np.ndarray, program: Program) -> Member:
    indices = np.sort(numbers) - slot.base
    name, rows = program.origin(slot)
    size = _size_before_split(program, slot, name) if slot.name in program.parts else slot.size
    return Member(name, slot.dim, tuple(np.sort(rows[indices]).tolist()), size, slot.block_dim, slot.blocks)


def _size_before_split(program: Program, slot: Slot, original: str) -> int:
    parts = [part for part in program.parts.values() if part.name == original]
    return sum(len(part.rows) for part in parts) if slot.dim == parts[0].dim else int(attribute(program.module, slot.name).shape[slot.dim])


def _named(groups: list[Group]) -> list[Group]:
    taken: dict[str, int] = {}
    named = []
    for group in groups:
        base = (group.consumers or group.producers)[0].name
        taken[base] = taken.get(base, 0) + 1
        name = base if taken[base] == 1 else f"{base}#{taken[base]}"
        named.append(replace(group, name=name))
    return named
