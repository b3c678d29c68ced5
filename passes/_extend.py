"""Hold a program that a foreign pass has written against the analysis, and let the analysis speak of the
weights that it brought.

A new weight has no channels that the analysis knows. It gets numbers of its own, which belong to whatever
they meet: a bias that a fusion has made goes with the rows of the weight it is added to. Two channel sets
that a new weight would join were free of each other before; that is a fault like any other.
"""

from __future__ import annotations

import bisect
from dataclasses import replace

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import fx

from fasp_fx.analysis._analysis import Analysis
from fasp_fx.analysis.build._walks import Pairs
from fasp_fx.analysis.channels import Numbering, Walk
from fasp_fx.capturing._program import Program
from fasp_fx.errors import VerificationError

from ._verify import hold, last_ones, meet, walk_strictly


def extend(program: Program, reference: Analysis) -> Analysis:
    """The analysis with numbers for the weights of ``program`` that it does not know.

    Raises:
        VerificationError: the program does not do what its origin did; names the node.
    """
    numbering, walk = _walk(program, reference)
    known = len(reference.labels) if reference.known is None else reference.known
    extended = replace(
        reference, numbering=numbering, labels=_labels(program, reference, numbering, walk), known=known
    )
    hold(walk, program, extended)
    program.walked = (program.module.graph, extended, walk)
    return extended


def _walk(program: Program, reference: Analysis) -> tuple[Numbering, Walk]:
    blocked: dict[tuple[str, int], tuple[int, int]] = {}
    while True:
        numbering = reference.numbering.open(blocked)
        walk = walk_strictly(program, reference, numbering, grows=True)
        missing = {
            place: blocks for place, blocks in walk.facts.blocks.items() if place not in numbering.blocked
        }
        if not missing:
            return numbering, walk
        blocked |= missing


def _labels(program: Program, reference: Analysis, numbering: Numbering, walk: Walk) -> np.ndarray:
    """The channel set of every number: that of the known channels it meets, or a set of its own."""
    old, sets = len(reference.labels), int(reference.labels.max(initial=-1)) + 1
    vertex = np.concatenate([reference.labels, np.arange(sets, sets + numbering.total - old)])
    last = last_ones(program, reference)
    meet(
        [
            (a[both], b[both], node)
            for a, b, node in walk.facts.pairs
            if (both := (a < old) & (b < old)).any()
        ],
        vertex,
        last,
        numbering,
    )
    edges = []
    for a, b, node in walk.facts.pairs:
        ends = np.stack([vertex[a], vertex[b]])
        free = (ends[0] != ends[1]) & ~np.isin(ends, last).any(0)
        edges += [(*ends[:, free], node)] if free.any() else []
    component = _components(edges, len(edges), sets + numbering.total - old)
    first_set = np.full(int(component.max(initial=-1)) + 1, -1, dtype=np.int64)
    joined = np.bincount(component[:sets], minlength=len(first_set)) > 1
    if joined.any():
        raise VerificationError(
            f"node '{_joining(edges, component.size, sets).name}' brings together channels which were not"
            " coupled before"
        )
    first_set[component[:sets]] = np.arange(sets)
    fresh = np.unique(component[sets:][first_set[component[sets:]] < 0])
    first_set[fresh] = sets + np.arange(len(fresh))
    labels = np.concatenate([reference.labels, first_set[component[vertex[old:]]]])
    labels.setflags(write=False)
    return labels


def _components(edges: Pairs, count: int, total: int) -> np.ndarray:
    first = np.concatenate([np.zeros(0, dtype=np.int64), *(a for a, _, _ in edges[:count])])
    second = np.concatenate([np.zeros(0, dtype=np.int64), *(b for _, b, _ in edges[:count])])
    return connected_components(
        coo_matrix((np.ones(len(first), dtype=np.int8), (first, second)), shape=(total, total)),
        directed=False,
    )[1].astype(np.int64)


def _joining(edges: Pairs, total: int, sets: int) -> fx.Node:
    """The first node in graph order that joins two known channel sets."""

    def joined(count: int) -> bool:
        return np.unique(_components(edges, count, total)[:sets]).size < sets

    return edges[bisect.bisect_left(range(1, len(edges) + 1), True, key=joined)][2]
