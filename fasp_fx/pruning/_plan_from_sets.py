"""A plan of given channel sets, however they were chosen."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from ..analysis._analysis import Analysis
from ..analysis.groups import FROZEN, PRUNABLE
from ..analysis.plan import PruningPlan
from ..calibration.observe._visit import Decision
from ..capturing._captured import Captured
from ..errors import ArgumentError, PlanError
from ._rewriting import analyze_for, make_plan
from .config import PruningConfig


def plan_from_sets(
    captured: Captured,
    removed: Mapping[str, Iterable[int]],
    *,
    granularity: Iterable[str] = ("channel",),
    include: Iterable[str] = (),
) -> PruningPlan:
    """The plan that removes given channel sets, however they were chosen; :func:`apply` carries it out.

    Args:
        captured: what :func:`fasp_fx.capture` returned.
        removed: for groups by their names, which channel sets go, counted from zero (``Member.sets`` says
            which set an index of a weight belongs to).
        granularity, include: as for :func:`analyze`, which gives the groups.

    Raises:
        ArgumentError: ``captured`` is no capture, or ``removed`` no mapping.
        PlanError: a group is not known or cannot be pruned, or a set is not there; or the blocks of a group
            would lose unequal counts, or too many.
    """
    if not isinstance(captured, Captured):
        raise ArgumentError(f"captured is a {type(captured).__name__}; pass what fasp_fx.capture returned")
    if not isinstance(removed, Mapping):
        raise ArgumentError(
            f"removed is a {type(removed).__name__}; pass a dict of channel sets by the names of groups"
        )
    analysis = analyze_for(captured.checked(), PruningConfig(granularity=granularity, include=include))
    groups = {group.name: group for group in analysis.chosen}
    gone = np.zeros(int(analysis.labels.max(initial=-1)) + 1, dtype=bool)
    for name, positions in removed.items():
        if name not in groups:
            raise PlanError(_why_not(str(name), analysis))
        if not isinstance(positions, Iterable):
            raise PlanError(
                f"'{name}' loses {positions!r}, which is no list; give the numbers of channel sets"
            )
        group, wanted = groups[name], np.unique(np.fromiter(map(_index, positions), dtype=np.int64))
        if len(wanted) and not (wanted[0] >= 0 and wanted[-1] < group.size):
            raise PlanError(
                f"'{name}' has the channel sets 0 to {group.size - 1}, not"
                f" {wanted[0] if wanted[0] < 0 else wanted[-1]}"
            )
        lost = {
            int(block): int((group.block_of[wanted] == block).sum()) for block in np.unique(group.block_of)
        }
        if len(set(lost.values())) > 1:
            raise PlanError(
                f"the {group.blocks} blocks of '{name}' must lose equally many channel sets, not"
                f" {', '.join(map(str, lost.values()))}"
            )
        if group.width - max(lost.values()) < group.needed:
            raise PlanError(
                f"'{name}' keeps at least {group.needed} of the {group.width} channel sets of a block; remove"
                " fewer"
            )
        gone[group.sets[wanted]] = True
    return make_plan(captured.program, analysis, Decision(gone[analysis.labels]))


def _why_not(name: str, analysis: Analysis) -> str:
    """Why a group is not among those that can be pruned."""
    known = next((group for group in analysis.groups if group.name == name), None)
    if known is None:
        near = difflib.get_close_matches(name, [group.name for group in analysis.chosen], 1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        return f"'{name}' is no group that can be pruned{guess}; analyze(...).groups has their names"
    if known.status == FROZEN:
        return f"'{name}' cannot be pruned: {known.reason}"
    if known.status not in (PRUNABLE, *analysis.include):
        return f"'{name}' is {known.status} ({known.reason}); pass include=({known.status!r},)"
    return f"'{name}' loses {known.granularity}s, which granularity= does not name; add {known.granularity!r}"


def _index(position: object) -> int:
    try:
        if isinstance(position, bool | np.bool_) or getattr(position, "dtype", None) == torch.bool:
            raise TypeError("a mask numbers nothing")
        index = operator.index(position)  # type: ignore[arg-type]
    except TypeError as error:
        raise PlanError(
            f"{position!r} is the number of no channel set; give integers, counted from zero (of a mask,"
            " mask.nonzero().flatten())"
        ) from error
    if abs(index) >= 2**63:
        raise PlanError(f"a number of {len(str(abs(index)))} digits is that of no channel set")
    return index


__all__ = ["plan_from_sets"]
