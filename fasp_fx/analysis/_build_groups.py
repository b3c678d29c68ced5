"""Build the groups of an analysis: their weights, blocks and granularity, and what freezes them after all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from ..capturing._fx import attribute
from ..capturing._program import Program
from ._grouping import LAYOUT, STATUS, ChannelSets, Keys
from .channels import Numbering, Slot, Use, Walk, marked
from .groups import APPROXIMATE, EXEMPT, FROZEN, PRUNABLE, Group, Member


class GroupBuilder:
    """Builds groups of one interpretation.

    Args:
        found: what is known of each channel set.
        block: the block of each channel set within its layout.
        numbering, walk, program: what was interpreted, and how.
    """

    def __init__(
        self, found: ChannelSets, block: np.ndarray, numbering: Numbering, walk: Walk, program: Program
    ) -> None:
        self.found, self.block, self.numbering, self.walk, self.program = (
            found,
            block,
            numbering,
            walk,
            program,
        )
        self.known_as = program.known_as()
        labels, facts = found.labels, walk.facts
        index_of = {(slot.name, slot.dim): index for index, slot in enumerate(numbering.slots)}
        self.produces = {index_of[slot] for _, slot in facts.produced if slot in index_of}
        computed = [numbers for numbers, slot in facts.produced if slot is None]
        if computed:
            flat = np.unique(np.concatenate(computed))
            self.produces |= set(numbering.slot_ids(flat[flat >= 0]).tolist())
        self.consumes = {index_of[slot] for use in facts.uses for slot in use.slots}
        self.positions = {node: index for index, node in enumerate(program.module.graph.nodes)}
        self.numbers_by_label = np.argsort(labels, kind="stable")
        self.label_counts = np.bincount(labels, minlength=found.count)
        self.label_begins = np.cumsum(self.label_counts) - self.label_counts
        self.headed = self._sets_of([numbers for _, numbers, _ in facts.heads])
        self.multiplied = self._sets_of(
            [product.numbers for product in facts.products] if found.exempt else []
        )
        self.parameters = {
            program.parts[name].source if name in program.parts else name
            for name, _ in program.module.named_parameters(remove_duplicate=False)
        }

    def _sets_of(self, numbers: list[np.ndarray]) -> np.ndarray:
        """Whether each channel set has some of these numbers."""
        return marked(self.found.count, *(self.found.labels[own] for own in numbers))

    def groups(self, group_of: np.ndarray, keys: Keys) -> list[Group]:
        """All groups, named, in graph order.

        Args:
            group_of, keys: of :func:`~fasp_fx.analysis._grouping.group_sets`.
        """
        order = np.argsort(group_of, kind="stable")
        bounds = np.searchsorted(group_of[order], np.arange(len(keys) + 1))
        found: list[tuple[Any, Group]] = []
        for index, (slot_ids, use_ids) in keys.items():
            for sets in self._of_one_size(order[bounds[index] : bounds[index + 1]]):
                found += self._group(sets, sorted(slot_ids), sorted(use_ids))
        return _named([group for _, group in sorted(found, key=lambda item: item[0])])

    def _of_one_size(self, members: np.ndarray) -> Iterator[np.ndarray]:
        """Blocks of unequal size are groups of their own."""
        _, inverse = np.unique(self.block[members], return_inverse=True)
        sizes = np.bincount(inverse)
        for size in np.unique(sizes):
            yield members[sizes[inverse] == size]

    def _group(self, sets: np.ndarray, slot_ids: list[int], use_ids: list[int]) -> list[tuple[Any, Group]]:
        """The group of some channel sets and its place in graph order, or nothing if there is nothing to say
        of it.
        """
        found = self.found
        numbers = self._numbers_of(sets)
        uses = tuple(self.walk.facts.uses[i] for i in use_ids)
        experts = bool(found.expert[sets].all())
        if experts:
            uses = (*uses, *last_products(found.labels, sets, self.walk))
        rows, columns = self._members(
            numbers, sets, slot_ids, {use.weight for use in uses} if experts else None
        )
        blocks = len(np.unique(self.block[sets]))
        size = len(sets) // blocks
        code, why = STATUS[int(found.status[sets[0]])], str(found.reason[sets[0]])
        if not uses and code in (PRUNABLE, APPROXIMATE) and not self.multiplied[sets].all():
            if not any(i in self.produces for i in slot_ids):
                return []  # a dimension that nothing in the graph speaks of
            lost = f"{why}, and no weight consumes what is left of them"
            code, why = FROZEN, lost if code == APPROXIMATE else "no weight consumes these channels"
        if size == 1 and (code in (PRUNABLE, APPROXIMATE) or (found.exempt and code == EXEMPT)):
            code, why = FROZEN, f"{LAYOUT}: one channel set takes the whole of a dimension"
        if not any(member.name in self.parameters for member in (*rows, *columns)):
            return []  # positions of buffers alone
        if code == FROZEN:
            blocks = 1  # frozen channels need no layout: they are shown as one block
        granularity = "expert" if experts else "head" if self.headed[sets].all() else "channel"
        needed = int(found.expert[sets].max()) if experts else 1
        if code == PRUNABLE and size <= needed:
            code, why = FROZEN, f"each token is sent to {needed} of them"
        slots = tuple(self.numbering.slots[i] for i in slot_ids)
        group = Group(
            "",
            len(sets),
            blocks,
            code,
            why,
            tuple(rows),
            tuple(columns),
            sets,
            self.block[sets],
            granularity,
            needed,
            uses,
            slots,
        )
        at = min((self.positions[use.node] for use in uses), default=len(self.positions))
        return [((at, int(numbers.min())), group)]

    def _numbers_of(self, sets: np.ndarray) -> np.ndarray:
        """The channel numbers of some sets, one set after the other."""
        first, counts = self.label_begins[sets], self.label_counts[sets]
        begins = np.cumsum(counts) - counts
        return self.numbers_by_label[np.arange(counts.sum()) + np.repeat(first - begins, counts)]

    def _members(
        self, numbers: np.ndarray, sets: np.ndarray, slot_ids: list[int], taking: set[str] | None
    ) -> tuple[list[Member], list[Member]]:
        """The weights that lose rows and those that lose columns; of experts, ``taking`` names the weights
        that lose columns.
        """
        own = self.numbering.slot_ids(numbers)
        # Few slots are few bits, by which a stable sort need not compare.
        order = np.argsort(own.astype(np.min_scalar_type(len(self.numbering.slots))), kind="stable")
        first, last = (np.searchsorted(own[order], slot_ids, side) for side in ("left", "right"))
        held = [
            (i, self.numbering.slots[i], numbers[order[begin:end]])
            for i, begin, end in zip(slot_ids, first, last, strict=True)
        ]

        def members(chosen: Iterable[tuple[int, Slot, np.ndarray]]) -> list[Member]:
            return members_of(
                [(slot, inside) for _, slot, inside in chosen],
                self.program,
                self.known_as,
                self.found.labels,
                sets,
            )

        weights = [item for item in held if item[1].kind == "weight"]
        if taking is not None:
            return members(item for item in weights if item[1].name not in taking), members(
                item for item in weights if item[1].name in taking
            )
        rows = (item for item in weights if item[0] in self.produces or item[0] not in self.consumes)
        return members(rows), members(item for item in held if item[0] in self.consumes)


def _named(groups: list[Group]) -> list[Group]:
    taken: dict[str, int] = {}
    named = []
    for group in groups:
        base = (group.consumers or group.producers)[0].name
        taken[base] = taken.get(base, 0) + 1
        name = base if taken[base] == 1 else f"{base}#{taken[base]}"
        named.append(replace(group, name=name))
    return named


def members_of(
    slots: list[tuple[Slot, np.ndarray]],
    program: Program,
    known_as: Mapping[str, Sequence[str]],
    labels: np.ndarray,
    sets: np.ndarray,
) -> list[Member]:
    """One member per weight of the caller's; the parts of a split one are shown together.

    Args:
        slots: dimensions of weights, each with the channel numbers along it that belong to the group.
        known_as: all names of the weights (:meth:`fasp_fx.capturing._program.Program.known_as`).
        labels: the channel set of every channel number.
        sets: those of the group, in its order.
    """
    order = np.argsort(sets)
    ordered = sets[order]
    found: dict[tuple[str, int], list[tuple[Slot, np.ndarray, np.ndarray]]] = {}
    for slot, numbers in slots:
        name, rows = program.origin(slot.name, slot.dim, slot.size)
        positions = order[np.searchsorted(ordered, labels[numbers])]
        found.setdefault((name, slot.dim), []).append((slot, rows[numbers - slot.base], positions))
    return [
        _member(name, program, tuple(other for other in known_as.get(name, ()) if other != name), pieces)
        for (name, _), pieces in found.items()
    ]


def _member(
    name: str, program: Program, aliases: tuple[str, ...], pieces: list[tuple[Slot, np.ndarray, np.ndarray]]
) -> Member:
    """The member that all pieces of a weight make up; columns are those of every piece."""
    slot = pieces[-1][0]
    indices, positions = (np.concatenate([piece[side] for piece in pieces[::-1]]) for side in (1, 2))
    if len(pieces) > 1 or not (indices[1:] > indices[:-1]).all():
        indices, first = np.unique(indices, return_index=True)
        positions = positions[first]
    size = _size_before_split(program, slot, name) if slot.name in program.parts else slot.size
    return Member(
        name,
        slot.dim,
        tuple(indices.tolist()),
        size,
        slot.block_dim,
        slot.blocks,
        tuple(positions.tolist()),
        aliases,
    )


def _size_before_split(program: Program, slot: Slot, original: str) -> int:
    parts = [part for part in program.parts.values() if part.source == original]
    return (
        sum(len(part.rows) for part in parts)
        if slot.dim == parts[0].dim
        else int(attribute(program.module, slot.name).shape[slot.dim])
    )


def needed_experts(labels: np.ndarray, count: int, walk: Walk) -> np.ndarray:
    """For each channel set that is an expert, how many a router needs at once; 0 for the others.

    An expert competes with its like in a softmax or top-k, and takes a whole matrix out of a stacked weight.
    """
    stacked = np.zeros(count, dtype=bool)
    for numbers in walk.facts.stacked:
        stacked[labels[numbers[numbers >= 0]]] = True
    needed = np.zeros(count, dtype=np.int64)
    for numbers, times in walk.facts.chosen:
        sets = np.unique(labels[numbers[numbers >= 0]])
        needed[sets] = np.maximum(needed[sets], times)
    return np.where(stacked, needed, 0)


def last_products(labels: np.ndarray, sets: np.ndarray, walk: Walk) -> list[Use]:
    """The uses of stacked weights, one block an expert, on which no other such use depends: what they give is
    what an expert gives.
    """
    uses = [
        use
        for use in walk.facts.uses
        if use.block_numbers is not None and np.isin(labels[use.block_numbers], sets).any()
    ]
    nodes = {use.node for use in uses}
    before: set[fx.Node] = set()
    for node in nodes:
        pending = list(node.all_input_nodes)
        seen: set[fx.Node] = set()
        while pending:
            source = pending.pop()
            if source not in seen:
                seen.add(source)
                pending += source.all_input_nodes
        before |= seen & nodes
    return [use for use in uses if use.node not in before]


__all__ = ["GroupBuilder", "members_of"]
