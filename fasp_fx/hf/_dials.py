"""Which fields of a config shrink which coupled groups, found by turning them one, two and three
at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from ..analysis.groups import Group
from ._experiments import Assignment, Experiments, Path, written

#: the most fields that are turned together
_TOGETHER = 3
#: up to this many channel sets, each number of them is tried
_FEW = 64
#: the most candidates combined for one group
_CANDIDATES = 8

Losses = dict[tuple[str, int], int]


@dataclass(frozen=True)
class Dial:
    """Fields that, lowered together in proportion, shrink some groups and nothing else.

    Attributes:
        fields: their places and present values.
        width: channel sets per block of the group with the fewest; the fields are multiples of it.
        groups: what it shrinks: for each name, how many channel sets a block loses for each that the dial is
            turned.
        turns: how far it can be turned; ``None``: anything below ``width``.
    """

    fields: tuple[tuple[Path, int], ...]
    width: int
    groups: Mapping[str, int]
    turns: tuple[int, ...] | None = None

    def set(self, turned: int) -> dict[Path, int]:
        """The values of its fields when each block has lost ``turned`` channel sets."""
        return {path: value * (self.width - turned) // self.width for path, value in self.fields}

    def __str__(self) -> str:
        return ", ".join(f"{written(path)}={value}" for path, value in self.fields)


@dataclass(frozen=True)
class Family:
    """What can be said of some groups.

    Attributes:
        joint: one dial for all of them. There can be rivals, which shapes cannot tell apart; what they
            compute does.
        fine: dials for each layer, where the class takes values by layer.
    """

    joint: tuple[Dial, ...]
    fine: tuple[Dial, ...] = ()

    @property
    def groups(self) -> set[str]:
        """The groups it speaks of."""
        return {name for dial in self.joint + self.fine for name in dial.groups}


class Search:
    """Finds the dials of some groups.

    Args:
        experiments: builds the model's class.
        groups: the groups that may be pruned; their members are named as in ``experiments.shapes``.
        by_layer: look for values by layer even where one value for all layers exists.

    Attributes:
        families: the dials found; no group is in two.
        unsaid: for each group that no field can shrink alone, why.
    """

    def __init__(self, experiments: Experiments, groups: Sequence[Group], by_layer: bool = False) -> None:
        self.experiments, self.groups, self.by_layer = experiments, groups, by_layer
        self._units = {group.name: _units(group) for group in groups}
        self._width = {group.name: group.width for group in groups}
        self._within = {place for units in self._units.values() for place in units}
        self._numbers = experiments.numbers()
        self.families: list[Family] = []
        self.unsaid: dict[str, str] = {}
        said: set[str] = set()
        for group in groups:
            if group.name not in said and (family := self._family(group, said)) is not None:
                self.families.append(family)
                said |= family.groups
        for group in groups:
            if group.name not in said:
                self.unsaid[group.name] = self._reason(group)

    def _family(self, group: Group, said: set[str]) -> Family | None:
        dials = [dial for dial in self._dials(group) if not said & dial.groups.keys()]
        joint = tuple(
            dial for dial in dials if dial.groups == dials[0].groups and dial.width == dials[0].width
        )
        fine: list[Dial] = []
        if not joint or (self.by_layer and len(joint[0].groups) > 1):
            fine = [dial for dial in self._by_layer(group, joint) if not said & dial.groups.keys()]
            if joint and {name for dial in fine for name in dial.groups} != joint[0].groups.keys():
                fine = []
        return Family(joint, tuple(fine)) if joint or fine else None

    def _dials(self, group: Group) -> list[Dial]:
        """Dials that shrink this group, those of fewest fields first."""
        found: list[Dial] = []
        for paths in _combinations(self._candidates(group)):
            if any({path for path, _ in dial.fields} <= set(paths) for dial in found):
                continue
            dial = self._dial(tuple((path, self._numbers[path]) for path in paths), group.width)
            if dial is not None and group.name in dial.groups:
                found.append(dial)
        return found

    def _candidates(self, group: Group) -> list[Path]:
        """Fields that could take part: multiples of the group's width that by themselves shrink nothing but
        groups, this one in part, or cannot be built.
        """
        touching, unbuilt = [], []
        for path in self._multiples(group):
            lost = self._alone(path, group.width)
            if isinstance(lost, str):
                unbuilt.append(path)
            elif lost.keys() <= self._within and _touches(lost, self._units[group.name]):
                touching.append(path)
        return (touching + unbuilt)[:_CANDIDATES]

    def _multiples(self, group: Group) -> list[Path]:
        return [path for path, value in self._numbers.items() if value % group.width == 0]

    def _alone(self, path: Path, width: int) -> Losses | str:
        """What one field shrinks by itself, at the first turn that can be built."""
        outcome: Losses | str = "cannot be turned"
        for turned in _tries(width):
            outcome = self.experiments.losses({path: self._numbers[path] * (width - turned) // width})
            if not isinstance(outcome, str):
                break
        return outcome

    def _dial(
        self, fields: tuple[tuple[Path, int], ...], width: int, base: Assignment | None = None
    ) -> Dial | None:
        """The dial of these fields, if at every turn that can be built they shrink groups and nothing else,
        in proportion.
        """
        dial = Dial(fields, width, {})
        turns: list[int] = []
        for turned in _tries(width):
            lost = self.experiments.losses({**(base or {}), **dial.set(turned)})
            if isinstance(lost, str):
                continue
            groups = self._explain(lost, turned)
            if not groups or (turns and groups != dial.groups):
                return None
            dial = Dial(fields, width, groups)
            turns.append(turned)
        if not turns:
            return None
        return Dial(fields, width, dial.groups, tuple(sorted(turns)) if width <= _FEW else None)

    def _explain(self, lost: Losses, turned: int) -> dict[str, int] | None:
        """The groups that shrink, and how many channel sets a block loses per turn, if that explains all that
        was lost.
        """
        groups: dict[str, int] = {}
        explained: Losses = {}
        for name, units in self._units.items():
            amounts = {lost.get(place, 0) / unit for place, unit in units.items()}
            if len(amounts) != 1 or (amount := amounts.pop() / turned) == 0:
                continue
            if amount != int(amount) or not 0 < amount * turned < self._width[name]:
                return None
            groups[name] = int(amount)
            for place, unit in units.items():
                explained[place] = explained.get(place, 0) + unit * turned * int(amount)
        return groups if groups and explained == lost else None

    def _by_layer(self, group: Group, joint: Sequence[Dial]) -> list[Dial]:
        """Dials for single layers: of a joint dial's fields, or of fields that shrink this group among
        others.
        """
        if joint:
            choices: Iterable[tuple[Path, ...]] = [tuple(path for path, _ in dial.fields) for dial in joint]
        else:
            touching = [
                path
                for path in self._multiples(group)
                if _touches(self._alone(path, group.width), self._units[group.name])
            ]
            choices = _combinations(touching[:_CANDIDATES])
        for paths in choices:
            for found in (self._overrides(paths, group.width), self._lists(paths, group.width)):
                if any(group.name in dial.groups for dial in found):
                    return found
        return []

    def _overrides(self, paths: tuple[Path, ...], width: int) -> list[Dial]:
        """The class may take values of its own for each layer under ``per_layer_config``, which every config
        has.
        """
        found: list[Dial] = []
        for layer in range(len(self.experiments.shapes)):
            fields = tuple(
                ((*path[:-1], "per_layer_config", str(layer), path[-1]), self._numbers[path])
                for path in paths
            )
            if isinstance(self.experiments.build(Dial(fields, width, {}).set(_tries(width)[0])), str):
                break  # no such layer, or no such thing
            dial = self._dial(fields, width)
            if dial is not None:
                found.append(dial)
        return found

    def _lists(self, paths: tuple[Path, ...], width: int) -> list[Dial]:
        """The class may take a list with a value for each layer; how many there are is some number of the
        config.
        """
        for count in sorted(
            {value for value in self._numbers.values() if 1 < value <= len(self.experiments.shapes)}
        ):
            lists = {path: [self._numbers[path]] * count for path in paths}
            if self.experiments.build(lists) != self.experiments.shapes:
                continue
            found = [
                self._dial(tuple(((*path, layer), self._numbers[path]) for path in paths), width, lists)
                for layer in range(count)
            ]
            if any(found):
                return [dial for dial in found if dial is not None]
        return []

    def _reason(self, group: Group) -> str:
        """What the fields that shrink this group do besides, or fail to do."""
        units, remarks = self._units[group.name], []
        for path in self._multiples(group):
            lost = self._alone(path, group.width)
            if isinstance(lost, str) or not _touches(lost, units):
                continue
            also = sorted(name for name, dim in lost.keys() - self._within)
            missed = sorted(name for name, dim in units.keys() - lost.keys())
            fault = (
                f"changes {also[0]} as well"
                if also
                else f"leaves {missed[0]} as it is"
                if missed
                else "changes some of it by another amount"
            )
            remarks.append(f"{written(path)} {fault}")
        first = next(iter(units))
        what = f"dimension {first[1]} of {first[0]}"
        return f"no field of {self.experiments.name} can say it: " + (
            "; ".join(remarks[:3]) if remarks else f"none that is a multiple of {group.width} changes {what}"
        )


def _units(group: Group) -> Losses:
    """By how much each dimension of each member shrinks for each channel set that every block of the group
    loses.
    """
    return {
        (member.name, member.dim): len(member.indices) // (group.width * member.blocks)
        for member in (*group.producers, *group.consumers)
    }


def _tries(width: int) -> list[int]:
    """Turns to try: all of them where they are few, and halves first, which divide well."""
    if width <= _FEW:
        return sorted(range(1, width), key=lambda turned: (width % turned, -turned))
    return [width // 2, width // 4, 1]


def _combinations(paths: Sequence[Path]) -> Iterator[tuple[Path, ...]]:
    for count in range(1, _TOGETHER + 1):
        yield from combinations(paths, count)


def _touches(lost: Losses | str, units: Losses) -> bool:
    return not isinstance(lost, str) and bool(lost.keys() & units.keys())
