"""The analysis of a model in parts, and what is counted in all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ...analysis._analysis import Analysis
from ...analysis.groups import Group
from ...analysis.resources import Resource, Sparsity
from ...errors import ArgumentError, CaptureError
from ._names import group_within

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


__all__ = ["Joined", "PartsAnalysis"]
