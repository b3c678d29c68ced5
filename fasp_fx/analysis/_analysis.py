"""Find the coupled groups of a program. Pure: reads a program, returns groups with a reason for
each status.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..base._undisturbed import without_collections
from ..capturing._program import Program
from ._coupling import Coupling
from .build._build_groups import GroupBuilder
from .build._depth import DEPTH, let_blocks_go
from .build._experts import needed_experts
from .build._explain import coupling_path
from .build._grouping import CODE, ChannelSets, group_sets
from .build._layout import find_blocks, torn_blocks
from .build._walks import label_sets, walk_program
from .channels import Execution
from .groups import EXEMPT, FROZEN
from .resources import Sparsity


@dataclass(repr=False)
class Analysis(Coupling):
    """The coupled groups of one program, and what can be asked of them."""

    @property
    def max_sparsity(self) -> float:
        """The highest sparsity that can be asked for with ``round_to=1`` (see
        :class:`fasp_fx.resources.Sparsity`).
        """
        return Sparsity(self).reach(1)

    def explain(self, first: str, second: str) -> list[str]:
        """The path of graph nodes that couples channels of two weights, from ``first`` to ``second``.

        Returns:
            One line per node of a shortest path; empty if no channel of one is coupled with a channel of the
            other.

        Raises:
            ArgumentError: a name is not a weight of the model.
        """
        return coupling_path(self, first, second)


@without_collections
def analyze_program(
    program: Program,
    split: Callable[[Program, Analysis], Program | None] | None = None,
    granularity: Iterable[str] = ("channel",),
    include: Iterable[str] = (),
) -> Analysis:
    """Analyse a captured program; if ``split`` is given, let it split fused producers that a layout ties
    together, and analyse again.
    """
    # Channel numbers are for the CPU, whatever the default device is; being told so delays every call.
    told = torch.get_default_device().type != "cpu"
    with torch.device("cpu") if told else contextlib.nullcontext():
        return _settled(program, split, granularity, include)


def _settled(
    program: Program,
    split: Callable[[Program, Analysis], Program | None] | None,
    granularity: Iterable[str],
    include: Iterable[str],
) -> Analysis:
    heads, experts, exempt = "head" in granularity, "expert" in granularity, EXEMPT in include
    execution = Execution()

    def settled(program: Program, heads: bool) -> Analysis:
        return replace(
            _analyze(program, heads, experts, exempt, execution),
            granularity=frozenset(granularity),
            include=frozenset(include),
        )

    analysis = settled(program, heads)
    while split is not None and (analysis.conflicts or exempt):
        # Rows are told apart one by one.
        rewritten = split(program, settled(program, False) if heads else analysis)
        if rewritten is None:
            break
        program, analysis = rewritten, settled(rewritten, heads)
    if DEPTH in include:
        groups = let_blocks_go(analysis.groups, analysis.labels, program, analysis.walk)
        analysis = replace(analysis, groups=groups)
    return analysis


def _analyze(program: Program, heads: bool, experts: bool, exempt: bool, execution: Execution) -> Analysis:
    numbering, walk = walk_program(program, heads, experts, execution)
    while True:
        labels = label_sets(numbering.total, walk.facts.pairs)
        labels.setflags(write=False)
        count = int(labels.max(initial=-1)) + 1
        expert = needed_experts(labels, count, walk) if experts else np.zeros(count, dtype=np.int64)
        found = ChannelSets.of(labels, expert, exempt, walk, program)
        spared = np.full(count, not exempt) & (found.status == CODE[EXEMPT])
        for slot, sets in torn_blocks(numbering, labels):
            found.freeze(sets[~spared[sets]], f"they are whole blocks of {slot}, which keep equal counts")
        group_of, keys = group_sets(found, numbering, walk)
        block, conflicts = find_blocks(
            list(walk.facts.boxes.values()),
            labels,
            np.where(found.status == CODE[FROZEN], -1, group_of),
            walk.facts.needed.values(),
        )
        uneven = [pair for conflict in conflicts for pair in walk.facts.stacks.pop(conflict.node, ())]
        if not uneven:
            break
        walk.facts.pairs += (
            uneven  # a stack whose positions cannot lose equal counts loses the same channels of all
        )
    for conflict in conflicts:
        # An exempt group is not pruned unless asked; its status says more than its layout.
        found.freeze(
            conflict.classes[~spared[conflict.classes]],
            f"equal counts cannot be kept in {conflict.node.name} = {conflict.node.target}",
        )
    if conflicts:
        group_of, keys = group_sets(found, numbering, walk)
    groups = GroupBuilder(found, block, numbering, walk, program).groups(group_of, keys)
    real = [c for c in conflicts if not spared[c.classes].all()]
    return Analysis(program, groups, real, labels, numbering, walk, experts=experts)
