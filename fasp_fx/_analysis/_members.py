"""The weights that lose rows or columns with a group, by their names in the caller's model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .._program import Program
from ..channels import Slot, attribute
from ..groups import Member


def members_of(
    slots: list[tuple[Slot, np.ndarray]], program: Program, labels: np.ndarray, sets: np.ndarray
) -> list[Member]:
    """One member per weight of the caller's; the parts of a split one are shown together.

    Args:
        slots: dimensions of weights, each with the channel numbers along it that belong to the group.
        labels: the channel set of every channel number.
        sets: those of the group, in its order.
    """
    order = np.argsort(sets)
    merged: dict[tuple[str, int], Member] = {}
    for slot, numbers in slots:
        positions = order[np.searchsorted(sets[order], labels[numbers])]
        member = _member(slot, numbers, positions, program)
        before = merged.get((member.name, member.dim))
        if before is not None:
            both = dict(
                sorted(
                    {
                        **dict(zip(before.indices, before.sets)),
                        **dict(zip(member.indices, member.sets)),
                    }.items()
                )
            )
            member = replace(member, indices=tuple(both), sets=tuple(both.values()))
        merged[(member.name, member.dim)] = member
    return list(merged.values())


def _member(slot: Slot, numbers: np.ndarray, positions: np.ndarray, program: Program) -> Member:
    name, rows = program.origin(slot)
    indices = rows[numbers - slot.base]
    order = np.argsort(indices)
    size = _size_before_split(program, slot, name) if slot.name in program.parts else slot.size
    return Member(
        name,
        slot.dim,
        tuple(indices[order].tolist()),
        size,
        slot.block_dim,
        slot.blocks,
        tuple(positions[order].tolist()),
    )


def _size_before_split(program: Program, slot: Slot, original: str) -> int:
    parts = [part for part in program.parts.values() if part.source == original]
    return (
        sum(len(part.rows) for part in parts)
        if slot.dim == parts[0].dim
        else int(attribute(program.module, slot.name).shape[slot.dim])
    )


__all__ = ["members_of"]
