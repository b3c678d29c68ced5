"""The weights that lose rows or columns with a group, by their names in the caller's model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .._program import Program
from ..channels import Slot, attribute
from ..groups import Member


def members_of(slots: list[tuple[Slot, np.ndarray]], program: Program) -> list[Member]:
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


__all__ = ["members_of"]
