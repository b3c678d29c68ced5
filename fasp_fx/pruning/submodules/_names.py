"""Plans and reports of a part in the names of the whole model, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ...analysis.groups import Group
from ...analysis.plan import PruningPlan
from ..report import Line


def plan_within(path: str, plan: PruningPlan) -> PruningPlan:
    """The plan of a part in the names of the whole model."""
    return _mapped(plan, lambda name: f"{path}.{name}")


def group_within(paths: Sequence[str], group: Group) -> Group:
    """The group of a part in the names of the whole model, in which the part stands at ``paths``."""
    producers, consumers = (
        tuple(
            replace(
                member,
                name=f"{paths[0]}.{member.name}",
                aliases=tuple(f"{path}.{name}" for path in paths for name in member.names)[1:],
            )
            for member in members
        )
        for members in (group.producers, group.consumers)
    )
    return replace(group, name=f"{paths[0]}.{group.name}", producers=producers, consumers=consumers)


def line_within(path: str, line: Line) -> Line:
    """The line of a part's report in the names of the whole model."""
    producers, consumers = (
        tuple((f"{path}.{name}", dim) for name, dim in members)
        for members in (line.producers, line.consumers)
    )
    return replace(line, name=f"{path}.{line.name}", producers=producers, consumers=consumers)


def plan_of_part(plan: PruningPlan, path: str) -> PruningPlan:
    """The groups of a whole plan that lie in a part, in the names of the part."""
    start = f"{path}."
    groups = tuple(group for group in plan.groups if group.name.startswith(start))
    return _mapped(
        replace(plan, groups=groups, splits=(), folds=(), copies=(), fixed=()),
        lambda name: name.removeprefix(start),
    )


def _mapped(plan: PruningPlan, change: Callable[[str], str]) -> PruningPlan:
    groups = tuple(
        replace(
            group,
            name=change(group.name),
            producers=tuple(replace(part, name=change(part.name)) for part in group.producers),
            consumers=tuple(replace(part, name=change(part.name)) for part in group.consumers),
        )
        for group in plan.groups
    )
    splits = tuple(
        replace(split, name=change(split.name), source=change(split.source)) for split in plan.splits
    )
    folds = tuple(
        replace(weight, name=change(weight.name), sources=tuple(map(change, weight.sources)))
        for weight in plan.folds
    )
    copies = tuple(
        replace(copied, name=change(copied.name), source=change(copied.source)) for copied in plan.copies
    )
    fixed = tuple(replace(buffer, name=change(buffer.name)) for buffer in plan.fixed)
    return replace(plan, groups=groups, splits=splits, folds=folds, copies=copies, fixed=fixed)


__all__ = ["group_within", "line_within", "plan_of_part", "plan_within"]
