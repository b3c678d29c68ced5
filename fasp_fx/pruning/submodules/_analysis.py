"""The analysis of a model in parts, plans and reports in the names of the whole model, and what is counted in
all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from ...analysis._analysis import Analysis
from ...analysis.groups import Group
from ...analysis.plan import PruningPlan
from ...analysis.resources import Resource, Sparsity
from ...errors import ArgumentError, CaptureError
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


_OF_ONE_PROGRAM = frozenset({"program", "conflicts", "labels", "numbering", "walk"})


class Joined(Resource):
    """What is counted in several programs as one.

    Args:
        groups: those of all programs, in the names of the model.
        parts: what is counted in each.
        times: how often each counts.
        around: how much there is of it outside of them.
    """

    def __init__(
        self, groups: Sequence[Group], parts: Sequence[Resource], times: Sequence[int], around: float
    ) -> None:
        super().__init__(groups, around + sum(n * part.whole for n, part in zip(times, parts, strict=True)))
        self._parts, self._times, self._around = parts, times, around

    def used(self, lost: Sequence[int]) -> float:
        left, found = iter(lost), self._around
        for part, times in zip(self._parts, self._times, strict=True):
            found += times * part.used([next(left) for _ in part.groups])
        return found


class PartsAnalysis(Analysis):
    """What :func:`fasp_fx.analyze` returns for a model that cannot be captured as a whole.

    Attributes:
        parts: the analysis of each captured submodule, by its path; the names in them are those of the
            submodule.
        left: for each submodule that stays whole, why.
        groups: the groups of all parts in the order in which the model calls them, in the names of the whole
            model.
    """

    parts: Mapping[str, Analysis]
    left: Mapping[str, str]

    def __init__(
        self, parts: Mapping[str, Analysis], left: Mapping[str, str], places: Mapping[str, Sequence[str]]
    ) -> None:
        self.parts, self.left = dict(parts), dict(left)
        one = next(iter(parts.values()))
        self.granularity, self.include = one.granularity, one.include
        self.groups = [
            group_within(places[path], group)
            for path, analysis in parts.items()
            for group in analysis.groups
        ]

    @property
    def max_sparsity(self) -> float:
        """The highest sparsity of all parts together that can be asked for with ``round_to=1``."""
        counted = [Sparsity(analysis) for analysis in self.parts.values()]
        return Joined(self.chosen, counted, [1] * len(counted), 0).reach(1)

    @cached_property
    def without_rule(self) -> dict[str, int]:
        """Operators of the parts that had no rule, with the number of times each stands in a graph."""
        return dict(
            sorted(
                sum(
                    (Counter(analysis.without_rule) for analysis in self.parts.values()), Counter[str]()
                ).items()
            )
        )

    def explain(self, first: str, second: str) -> list[str]:
        """As :meth:`fasp_fx.Analysis.explain`, within one part; weights of two parts are not coupled.

        Raises:
            ArgumentError: a name is not a weight of any part.
        """
        paths = [
            next((path for path in self.parts if name.startswith(f"{path}.")), None)
            for name in (first, second)
        ]
        for name, path in zip((first, second), paths, strict=True):
            if path is None:
                raise ArgumentError(
                    f"'{name}' is not a weight of a part that was captured; these are"
                    f" {', '.join(map(repr, self.parts))}"
                )
        path = paths[0]
        assert path is not None
        return (
            self.parts[path].explain(first.removeprefix(f"{path}."), second.removeprefix(f"{path}."))
            if path == paths[1]
            else []
        )

    def __getattr__(self, name: str) -> Any:
        if name in _OF_ONE_PROGRAM:
            raise CaptureError(
                f"a model analysed in parts has no single '{name}'; analysis.parts holds the analysis of each"
                " part"
            )
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __repr__(self) -> str:
        return f"PartsAnalysis(parts={list(self.parts)}, left={self.left})"

    __eq__ = object.__eq__
    __hash__ = object.__hash__


__all__ = ["Joined", "PartsAnalysis", "group_within", "line_within", "plan_of_part", "plan_within"]
