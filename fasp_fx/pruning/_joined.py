"""Several programs as one model: groups in the names of the model, and what is counted in all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from fasp_fx.analysis import Analysis, Group, Groups, Resource, Sparsity
from fasp_fx.errors import ArgumentError

# --- Plans and reports in the names of the whole model.


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


#: fields of plans and reports that hold names of groups or weights
_NAMES = frozenset({"name", "source", "sources", "producers", "consumers"})


def renamed(value: Any, change: Callable[[str], str], is_name: bool = False) -> Any:
    """A plan, or a line of a report, with other names of groups and weights."""
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return replace(
            value, **{name: renamed(getattr(value, name), change, name in _NAMES) for name in names}
        )
    if isinstance(value, tuple):
        return tuple(renamed(item, change, is_name) for item in value)
    return change(value) if is_name and isinstance(value, str) else value


# --- What is counted, and known, of all parts together.


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
        counts, total = iter(lost), self._around
        for part, times in zip(self._parts, self._times, strict=True):
            total += times * part.used([next(counts) for _ in part.groups])
        return total


class PartsAnalysis(Groups):
    """What :func:`fasp_fx.analyze` returns for a model that cannot be captured as a whole.

    Attributes:
        parts: the analysis of each captured submodule, by its path; the names in them are those of the
            submodule.
        left: for each submodule that stays whole, why.
        groups: the groups of all parts in the order in which the model calls them, in the names of the whole
            model.
    """

    def __init__(
        self, parts: Mapping[str, Analysis], left: Mapping[str, str], groups: Sequence[Group]
    ) -> None:
        self.parts, self.left, self.groups = dict(parts), dict(left), list(groups)
        one = next(iter(parts.values()))
        self.granularity, self.include = one.granularity, one.include

    @property
    def max_sparsity(self) -> float:
        """The highest sparsity of all parts together that can be asked for with ``round_to=1``."""
        resources = [Sparsity(analysis) for analysis in self.parts.values()]
        return Joined(self.chosen, resources, [1] * len(resources), 0).reach(1)

    def explain(self, first: str, second: str) -> list[str]:
        """As :meth:`fasp_fx.Analysis.explain`, of two weights of one part in the names of the whole model.

        Raises:
            ArgumentError: they are in no part together, or not coupled there.
        """
        for path, analysis in self.parts.items():
            inside = f"{path}."
            if first.startswith(inside) and second.startswith(inside):
                lines = analysis.explain(first.removeprefix(inside), second.removeprefix(inside))
                return [line if " = " in line else f"{inside}{line}" for line in lines]
        raise ArgumentError(
            f"'{first}' and '{second}' are in no part together that was captured ({', '.join(self.parts)})"
        )
