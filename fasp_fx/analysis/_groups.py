"""Coupled groups: what the analysis returns."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from torch import fx

from fasp_fx.capturing import Program

from .channels import Numbering, Slot, Use, Walk

PRUNABLE, EXEMPT, APPROXIMATE, FROZEN = "prunable", "exempt", "approximate", "frozen"


def ranges(indices: tuple[int, ...]) -> str:
    """Indices as compact text: ``0-15,32,40-47``."""
    values = np.array(sorted(indices), dtype=np.int64)
    runs = np.split(values, np.nonzero(np.diff(values) != 1)[0] + 1) if indices else []
    return ",".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"


def by_block(block_of: np.ndarray) -> list[np.ndarray]:
    """The channel sets of each block, given the block of each channel set, shape ``[sets]``."""
    return [np.flatnonzero(block_of == block) for block in np.unique(block_of)]


@dataclass(frozen=True)
class Member:
    """One weight of a group: the channels ``indices`` along ``dim`` of the weight ``name`` belong to it.

    Where ``block_dim`` divides the weight into ``blocks`` with channels of their own, ``indices`` and
    ``size`` count those of all blocks in order. ``sets`` says for each index which of the group's channel
    sets it belongs to, counted from zero. ``aliases`` are the weight's other names in the model (it is tied),
    and those of what the model computes it of (it was folded).

    Examples:
        >>> (reader,) = group.consumers
        >>> print(reader.name, reader.dim, reader.size)
        2.weight 1 32
    """

    name: str
    dim: int
    indices: tuple[int, ...]
    size: int
    block_dim: int | None = None
    blocks: int = 1
    sets: tuple[int, ...] = field(repr=False, compare=False, default=())
    aliases: tuple[str, ...] = field(repr=False, compare=False, default=())

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the weight."""
        return (self.name, *self.aliases)

    def __str__(self) -> str:
        part = "" if len(self.indices) == self.size else f" {ranges(self.indices)}"
        per = f" x {self.blocks}" if self.blocks > 1 else ""
        return f"{self.name}[{self.dim}{per}]{part}"


@dataclass(frozen=True)
class Group:
    """All channel sets with the same producers and the same consumers.

    Attributes:
        name: the name of its first consumer (or producer), unique within the analysis.
        size: the number of channel sets.
        blocks: the number of blocks (attention heads, say) that must lose equal counts.
        status: ``"prunable"``, ``"exempt"``, ``"approximate"`` or ``"frozen"``.
        reason: why it has that status; empty for prunable groups.
        producers: weights that lose rows with it.
        consumers: weights that lose columns with it.
        granularity: what one channel set is: ``"channel"``, ``"head"`` (all channels of an attention head) or
            ``"expert"`` (of a mixture).
        needed: how many channel sets of each block have to stay.
        at_once: whether all of them go or none.
        multiple: channels of each block stay in multiples of it.

    Examples:
        >>> group = analysis.groups[1]
        >>> print(group.name, group.status, group.size)
        2.weight prunable 32
        >>> [member.name for member in group.producers]
        ['0.weight', '0.bias']
    """

    name: str
    size: int
    blocks: int
    status: str
    reason: str
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]
    sets: np.ndarray = field(repr=False, compare=False, default_factory=lambda: np.zeros(0, dtype=np.int64))
    block_of: np.ndarray = field(
        repr=False, compare=False, default_factory=lambda: np.zeros(0, dtype=np.int64)
    )
    granularity: str = "channel"
    needed: int = 1
    uses: tuple[Use, ...] = field(repr=False, compare=False, default=())
    slots: tuple[Slot, ...] = field(repr=False, compare=False, default=())
    at_once: bool = False
    multiple: int = 1

    @property
    def members(self) -> tuple[Member, ...]:
        """All weights that lose rows or columns with it."""
        return (*self.producers, *self.consumers)

    @property
    def names(self) -> frozenset[str]:
        """All names of these weights."""
        return frozenset(name for member in self.members for name in member.names)

    @property
    def width(self) -> int:
        """Channel sets per block."""
        return self.size // self.blocks

    @property
    def deepest_loss(self) -> int:
        """The most channel sets that one block can lose."""
        return max(self.width - self.needed, 0)

    def most_lost(self, round_to: int | None) -> int:
        """The most channel sets that one block can lose, ``round_to`` as for :meth:`step`."""
        step = self.step(round_to)
        return max(self.width - -(-self.needed // step) * step, 0)

    def step(self, round_to: int | None) -> int:
        """What the channel sets that stay of a block are a multiple of, where kept *widths* are multiples of
        ``round_to``: a whole head or expert that goes leaves the widths of the others as they are. ``None``:
        of 16, and where a block has fewer than 128, of the largest power of two that it has eight times.
        """
        if self.at_once:
            return self.width
        if self.granularity == "channel":
            usual = min(16, 1 << max(self.width // 8, 1).bit_length() - 1)
            return math.lcm(round_to or usual, self.multiple)
        counts = [len(member.indices) // (self.width * member.blocks) for member in self.members]
        return self.multiple // math.gcd(self.multiple, max(counts, default=1))

    def __str__(self) -> str:
        shape = f"{self.blocks} x {self.width}" if self.blocks > 1 else str(self.size)
        shape += f" {self.granularity}s" if self.granularity != "channel" else ""
        left, right = (", ".join(map(str, side)) or "-" for side in (self.producers, self.consumers))
        why = f"  ({self.reason})" if self.reason else ""
        return f"{self.status:<11} {shape:>10}  {left} -> {right}{why}"


@dataclass(frozen=True)
class Conflict:
    """A tensor that would stop being a box: ``classes`` are the channel sets concerned."""

    node: fx.Node
    classes: np.ndarray


class Groups:
    """The coupled groups of a model, and those of them that are pruned.

    Attributes:
        groups: all groups, in the order of the graph.
        granularity, include: as for :func:`fasp_fx.prune`.
    """

    groups: list[Group]
    granularity: frozenset[str]
    include: frozenset[str]

    def __repr__(self) -> str:
        counts = Counter(group.status for group in self.groups)
        return (
            f"Analysis({', '.join(f'{count} {status}' for status, count in counts.items()) or 'no groups'})"
        )

    @property
    def chosen(self) -> list[Group]:
        """The groups that are pruned: prunable ones and those asked for, at the granularities asked for."""
        return [
            group
            for group in self.groups
            if (group.status == PRUNABLE or group.status in self.include)
            and group.granularity in self.granularity
        ]

    def select(self, status: str) -> list[Group]:
        """The groups of one status."""
        return [group for group in self.groups if group.status == status]


@dataclass(repr=False)
class Coupling(Groups):
    """The coupled groups of one program.

    Attributes:
        program: the captured program, with fused producers split where a layout demanded it.
        groups: all groups, in graph order.
        conflicts: tensors whose layout stands in the way (their groups are frozen with reason ``layout``).
        labels: the channel set of each channel number.
        granularity, include: as for :func:`fasp_fx.prune`.
        brought: weights that foreign passes have brought, of which no plan speaks; ``None``: none has run.
    """

    program: Program
    groups: list[Group]
    conflicts: list[Conflict]
    labels: np.ndarray
    numbering: Numbering
    walk: Walk
    granularity: frozenset[str] = frozenset({"channel"})
    include: frozenset[str] = frozenset()
    brought: frozenset[str] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same with lists of its own; program and walk, which nothing changes, are shared."""
        return replace(
            self, groups=list(self.groups), conflicts=list(self.conflicts), labels=self.labels.copy()
        )

    @cached_property
    def without_rule(self) -> dict[str, int]:
        """Operators that had no rule and froze what they touched, with the number of times each stands in the
        graph.
        """
        return {name: len(nodes) for name, nodes in sorted(self.walk.without_rule.items())}
