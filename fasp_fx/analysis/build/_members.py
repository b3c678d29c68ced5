"""The weights that lose rows or columns with a group, by their names in the caller's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...capturing._program import Program
from ..channels import Slot
from ...capturing._fx import attribute
from ..groups import Member


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


__all__ = ["members_of"]
