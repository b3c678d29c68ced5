"""Which channel sets are whole experts of a mixture, and which products give an expert's result."""

from __future__ import annotations

import numpy as np
from torch import fx

from ..channels import Use, Walk


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
