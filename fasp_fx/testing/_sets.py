"""Which channel sets go, drawn at random within what every block can lose."""

from __future__ import annotations

import numpy as np

from fasp_fx.analysis._analysis import Analysis


def draw_sets(analysis: Analysis, random: np.random.Generator) -> np.ndarray:
    """Of every block of each group that is pruned a random number of channel sets, the same in all its
    blocks, and at least one in all.

    Every other block that may go as a whole does. Shape ``[sets]``, boolean.
    """
    chosen = np.zeros(int(analysis.labels.max(initial=-1)) + 1, dtype=bool)
    groups = [group for group in analysis.chosen if group.width > max(group.needed, 1)]
    sure = int(random.integers(len(groups))) if groups else -1
    for index, group in enumerate(groups):
        count = int(random.integers(1 if index == sure else 0, group.width - group.needed + 1))
        if not group.needed and random.integers(2):
            count = group.width
        for block in np.unique(group.block_of):
            chosen[random.choice(group.sets[group.block_of == block], count, replace=False)] = True
    return chosen


def draw_part(analysis: Analysis, chosen: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Some of the chosen channel sets, at least one, and the same number from every block of a group."""
    part = np.zeros_like(chosen)
    losing = [group for group in analysis.groups if chosen[group.sets].any()]
    sure = int(random.integers(len(losing))) if losing else -1
    for index, group in enumerate(losing):
        blocks = [
            group.sets[(group.block_of == block) & chosen[group.sets]] for block in np.unique(group.block_of)
        ]
        count = int(random.integers(1 if index == sure else 0, len(blocks[0]) + 1))
        if count == group.width - 1 and len(blocks[0]) == group.width:
            count = group.width  # a dimension of one channel is none that a second step could take it from
        for own in blocks:
            part[random.choice(own, count, replace=False)] = True
    return part
