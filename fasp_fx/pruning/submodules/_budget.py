"""The weights counted in several parts of a model as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...analysis.resources import Resource
from ._names import group_within


class JoinedSparsity(Resource):
    """The weights counted in several parts as one: sparsity is the fraction removed of all of them.

    Args:
        parts: those of the parts, by the paths at which each stands; groups go by the names that they have in
            the whole model.
    """

    def __init__(self, parts: Mapping[tuple[str, ...], Resource]) -> None:
        groups = [group_within(paths, group) for paths, part in parts.items() for group in part.groups]
        super().__init__(groups, sum(part.whole for part in parts.values()))
        self.parts = list(parts.values())

    def split(self, lost: Sequence[int]) -> list[list[int]]:
        """One list for the groups of each part."""
        found, start = [], 0
        for part in self.parts:
            found.append(list(lost[start : start + len(part.groups)]))
            start += len(part.groups)
        return found

    def used(self, lost: Sequence[int]) -> float:
        return sum(part.used(own) for part, own in zip(self.parts, self.split(lost), strict=True))

    def removed(self, lost: Sequence[int]) -> float:
        return self.average(
            [part.removed(own) for part, own in zip(self.parts, self.split(lost), strict=True)]
        )

    def average(self, sparsities: list[float]) -> float:
        """The sparsity of the whole, from those of the parts."""
        return sum(part.whole * own for part, own in zip(self.parts, sparsities, strict=True)) / max(
            self.whole, 1
        )


__all__ = ["JoinedSparsity"]
