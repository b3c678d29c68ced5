"""Hold a rewritten program against the analysis of the program it came from.

The rewritten program is interpreted on the *original* channel numbers of the rows and columns that its
weights still have. Channels that meet must belong to the same channel set as they did before; nothing may
meet a position that it did not meet before; every node must execute; outputs keep their shapes. A weight cut
at the wrong rows, a size left unchanged, a swapped order: each makes numbers meet that were never coupled.
"""

from __future__ import annotations

import numpy as np
import torch

from fasp_fx.analysis import (
    NONE,
    Analysis,
    Interpreter,
    Numbering,
    Pairs,
    Remark,
    Value,
    Walk,
    by_block,
    marked,
)
from fasp_fx.capturing import Program, results
from fasp_fx.errors import VerificationError
from fasp_fx.patterns import lookup


def verify(program: Program, reference: Analysis) -> Walk:
    """Check ``program`` against the analysis of its origin.

    Returns:
        The interpretation of the rewritten program.

    Raises:
        VerificationError: names the node and what differs.

    Examples:
        >>> walk = fasp_fx.passes.verify(captured.program, analysis)
    """
    granularity = reference.granularity & {"expert"}
    walk = Interpreter(program, reference.numbering, granularity, program.numbers, reference.walk).run()
    labels, last = reference.labels, _last_ones(program, reference)
    last = np.union1d(last, _mistaken(walk.facts.pairs, labels, last))
    _meet(walk.facts.pairs, labels, last, reference.numbering)
    now, before = walk.facts.remarks, reference.walk.facts.remarks
    for kind, remarks, allowed in (
        ("froze", now.frozen, before.frozen),
        ("mixes", now.mixed, before.mixed),
        ("contracts", now.exempt, before.exempt),
    ):
        _subset(kind, remarks, allowed, labels, last)
    _same_outputs(walk, reference, program)
    return walk


def _mistaken(pairs: Pairs, labels: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The channel sets that the last ones are taken for: they stand for these from then on, and prove nothing
    either.
    """
    met = [np.stack([labels[first], labels[second]]) for first, second, _ in pairs if last.size]
    both = np.concatenate([np.zeros((2, 0), dtype=np.int64), *met], axis=1)
    return np.unique(both[:, (both[0] != both[1]) & np.isin(both, last).any(0)])


def _meet(pairs: Pairs, labels: np.ndarray, last: np.ndarray, numbering: Numbering) -> None:
    """Only channels of one set may meet.

    Raises:
        VerificationError: names the node and the channels.
    """
    free = ~marked(int(labels.max(initial=-1)) + 1, last)
    for first, second, node in pairs:
        one, other = labels[first], labels[second]
        wrong = np.nonzero((one != other) & free[one] & free[other])[0]
        if wrong.size:
            a, b = numbering.slot_of(int(first[wrong[0]])), numbering.slot_of(int(second[wrong[0]]))
            raise VerificationError(
                f"node '{node.name}' ({node.target}) brings together channel {int(first[wrong[0]]) - a.base}"
                f" of {a} and channel {int(second[wrong[0]]) - b.base} of {b}, which were not coupled before"
            )


def _last_ones(program: Program, reference: Analysis) -> np.ndarray:
    """The channel sets that are the only ones left of their block, or of a part of it that the graph takes
    out (a slice, a split).

    A dimension of one position, or of one channel repeated, looks like a dimension without channels, and what
    is left of a box of which one dimension became 1 looks like channels of another dimension, so that what
    they meet proves nothing.
    """
    gone = _gone(program, reference)
    if not gone.any():
        return np.zeros(0, dtype=np.int64)
    losing = (group for group in reference.groups if gone[group.sets].any())
    blocks = [group.sets[each] for group in losing for each in by_block(group.block_of)]
    last = [members[~gone[members]] for members in blocks if gone[members].sum() == len(members) - 1]
    return np.concatenate([np.zeros(0, dtype=np.int64), *last, *_alone_in_parts(reference, gone)])


def _gone(program: Program, reference: Analysis) -> np.ndarray:
    """Whether each channel set is gone. A block that went as a whole takes numbers of sets along of which
    other blocks may still hold the rest.
    """
    count = int(reference.labels.max(initial=-1)) + 1
    cut, with_blocks, kept = (np.zeros(count, dtype=bool) for _ in range(3))
    for name, numbers in program.numbers.items():
        for dim, left in enumerate(numbers):
            slot = reference.numbering.get(name, dim)
            if slot is not None and left is not None:
                rows = slot.numbers().reshape(slot.blocks, -1).numpy()
                sets, stays = reference.labels[rows], np.isin(rows, left.numpy())
                kept[sets[stays]] = True
                cut[sets[~stays & stays.any(1, keepdims=True)]] = True
                with_blocks[sets[~stays.any(1)]] = True
    return cut | (with_blocks & ~kept)


def _alone_in_parts(reference: Analysis, gone: np.ndarray) -> list[np.ndarray]:
    """The channel sets of which one position is all that is left of what a node takes out."""
    alone_sets = []
    for node, value in reference.walk.values.items():
        rule = lookup(node.target)
        if rule is None or not rule.all("part") or node.target is torch.ops.aten.select.int:
            continue
        for part in value if isinstance(value, tuple) else (value,):
            for axis in part.axes if isinstance(part, Value) else ():
                rows = axis.numbers.movedim(axis.dim, -1).reshape(-1, axis.numbers.shape[axis.dim]).numpy()
                left = (rows != NONE) & ~gone[reference.labels[rows]]
                alone = rows[left & (left.sum(1, keepdims=True) == 1)]
                alone_sets.append(np.unique(reference.labels[alone]))
    return alone_sets


def _subset(
    kind: str, remarks: list[Remark], allowed: list[Remark], labels: np.ndarray, last: np.ndarray
) -> None:
    # What a node says of the last ones it says of all that they meet there, and of neither for a reason of
    # their own.
    before = marked(int(labels.max(initial=-1)) + 1, last)
    misled = {(remark.node, remark.reason) for remark in remarks if before[labels[remark.numbers]].any()}
    also = [remark for remark in remarks if (remark.node, remark.reason) in misled]
    for remark in (*also, *allowed):
        before[labels[remark.numbers]] = True
    for remark in remarks:
        if not before[labels[remark.numbers]].all():
            where = f"node '{remark.node.name}'" if remark.node is not None else "the graph"
            raise VerificationError(f"{where} {kind} channels that were free before: {remark.reason}")


def _shapes(program: Program, walk: Walk) -> list[tuple[int, ...] | None]:
    """The shapes of what a program returns; ``None`` for what is no tensor."""
    executed = map(walk.executed.get, results(program.module.graph))
    return [tuple(value.shape) if isinstance(value, torch.Tensor) else None for value in executed]


def _same_outputs(walk: Walk, reference: Analysis, program: Program) -> None:
    if walk.sizes.assigned != reference.walk.sizes.assigned:
        return  # the two were executed at different sizes; the final export compares symbolic shapes
    before, after = _shapes(reference.program, reference.walk), _shapes(program, walk)
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if old != new and index not in reference.program.state_outputs:
            raise VerificationError(f"output {index} had shape {old} and now has {new}")
