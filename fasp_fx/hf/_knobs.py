"""Which fields of a config shrink which coupled groups, found by lowering them one, two and three
at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from ..analysis.groups import Group
from ._experiments import Assignment, Experiments, Path, written

#: the most fields that are lowered together
_TOGETHER = 3
#: up to this many channel sets, each number of them is tried
_FEW = 64
#: the most candidates combined for one group
_CANDIDATES = 8

Losses = dict[tuple[str, int], int]


@dataclass(frozen=True)
class ConfigKnob:
    """Fields that, lowered together in proportion, shrink some groups and nothing else.

    Attributes:
        fields: their places and present values.
        width: channel sets per block of the group with the fewest; the fields are multiples of it.
        groups: what it shrinks: for each name, how many channel sets a block loses in each step.
        steps: how far it can be lowered; ``None``: anything below ``width``.
    """

    fields: tuple[tuple[Path, int], ...]
    width: int
    groups: Mapping[str, int]
    steps: tuple[int, ...] | None = None

    def lowered(self, steps: int) -> dict[Path, int]:
        """The values of its fields when each block has lost channel sets in so many steps."""
        return {path: value * (self.width - steps) // self.width for path, value in self.fields}

    def possible(self) -> Sequence[int]:
        """How far it can be lowered, none left out."""
        return range(1, self.width) if self.steps is None else self.steps

    def __str__(self) -> str:
        return ", ".join(f"{written(path)}={value}" for path, value in self.fields)


@dataclass(frozen=True)
class Family:
    """The knobs of some groups.

    Attributes:
        shared: one knob for all of them. There can be rivals, which shapes cannot tell apart; what they
            compute does.
        per_layer: a knob for each layer, where the class takes values by layer.
    """

    shared: tuple[ConfigKnob, ...]
    per_layer: tuple[ConfigKnob, ...] = ()

    @property
    def groups(self) -> set[str]:
        """The groups that they shrink."""
        return {name for knob in self.shared + self.per_layer for name in knob.groups}


class KnobSearch:
    """Finds the knobs of some groups.

    Args:
        experiments: builds the model's class.
        groups: the groups that may be pruned; their members are named as in ``experiments.shapes``.
        by_layer: look for values by layer even where one value for all layers exists.

    Attributes:
        families: what was found; no group is in two.
        inexpressible: for each group that no field can shrink alone, why.
    """

    def __init__(self, experiments: Experiments, groups: Sequence[Group], by_layer: bool = False) -> None:
        self.experiments, self.by_layer = experiments, by_layer
        self._units = {group.name: _units(group) for group in groups}
        self._width = {group.name: group.width for group in groups}
        self._within = {place for units in self._units.values() for place in units}
        self._numbers = experiments.numbers()
        self.families: list[Family] = []
        known: set[str] = set()
        for group in groups:
            if group.name not in known and (family := self._family(group, known)) is not None:
                self.families.append(family)
                known |= family.groups
        self.inexpressible = {group.name: self._reason(group) for group in groups if group.name not in known}

    def _family(self, group: Group, known: set[str]) -> Family | None:
        knobs = [knob for knob in self._shared(group) if not known & knob.groups.keys()]
        same = [(knob.groups, knob.width) for knob in knobs[:1]]
        shared = tuple(knob for knob in knobs if [(knob.groups, knob.width)] == same)
        per_layer: tuple[ConfigKnob, ...] = ()
        if not shared or (self.by_layer and len(shared[0].groups) > 1):
            found = self._per_layer(group, shared)
            per_layer = tuple(knob for knob in found if not known & knob.groups.keys())
            if shared and {name for knob in per_layer for name in knob.groups} != shared[0].groups.keys():
                per_layer = ()
        return Family(shared, per_layer) if shared or per_layer else None

    def _shared(self, group: Group) -> list[ConfigKnob]:
        """Knobs that shrink this group, those of fewest fields first: of fields that by themselves shrink
        nothing but groups, this one in part, or cannot be built.
        """
        alone = {path: self._alone(path, group.width) for path in self._multiples(group)}
        touching = [
            path
            for path, lost in alone.items()
            if _touches(lost, self._units[group.name]) and set(lost) <= self._within
        ]
        unbuilt = [path for path, lost in alone.items() if isinstance(lost, str)]
        found: list[ConfigKnob] = []
        for paths in _combined((touching + unbuilt)[:_CANDIDATES]):
            if any({path for path, _ in knob.fields} <= set(paths) for knob in found):
                continue
            knob = self._knob(tuple((path, self._numbers[path]) for path in paths), group.width)
            if knob is not None and group.name in knob.groups:
                found.append(knob)
        return found

    def _multiples(self, group: Group) -> list[Path]:
        return [path for path, value in self._numbers.items() if value % group.width == 0]

    def _alone(self, path: Path, width: int) -> Losses | str:
        """What one field shrinks by itself, at the first step that can be built."""
        knob = ConfigKnob(((path, self._numbers[path]),), width, {})
        outcomes = (self.experiments.losses(knob.lowered(steps)) for steps in _tries(width))
        return next((lost for lost in outcomes if not isinstance(lost, str)), "cannot be lowered")

    def _knob(
        self, fields: tuple[tuple[Path, int], ...], width: int, base: Assignment | None = None
    ) -> ConfigKnob | None:
        """The knob of these fields, if at every step that can be built they shrink groups and nothing else,
        in proportion.
        """
        knob = ConfigKnob(fields, width, {})
        built: list[int] = []
        for steps in _tries(width):
            lost = self.experiments.losses({**(base or {}), **knob.lowered(steps)})
            if isinstance(lost, str):
                continue
            groups = self._explained(lost, steps)
            if not groups or (built and groups != knob.groups):
                return None
            knob = replace(knob, groups=groups)
            built.append(steps)
        return replace(knob, steps=tuple(sorted(built)) if width <= _FEW else None) if built else None

    def _explained(self, lost: Losses, steps: int) -> dict[str, int] | None:
        """The groups that shrink, and how many channel sets a block loses per step, if that explains all that
        was lost.
        """
        groups: dict[str, int] = {}
        explained: Losses = {}
        for name, units in self._units.items():
            amounts = {lost.get(place, 0) / unit for place, unit in units.items()}
            if len(amounts) != 1 or (amount := amounts.pop() / steps) == 0:
                continue
            if amount != int(amount) or not 0 < amount * steps < self._width[name]:
                return None
            groups[name] = int(amount)
            for place, unit in units.items():
                explained[place] = explained.get(place, 0) + unit * steps * int(amount)
        return groups if explained == lost else None

    def _per_layer(self, group: Group, shared: Sequence[ConfigKnob]) -> list[ConfigKnob]:
        """Knobs for single layers: of the fields of a shared one, or of fields that shrink this group among
        others.
        """
        choices = [tuple(path for path, _ in knob.fields) for knob in shared]
        if not shared:
            units, multiples = self._units[group.name], self._multiples(group)
            touching = [path for path in multiples if _touches(self._alone(path, group.width), units)]
            choices = _combined(touching[:_CANDIDATES])
        for paths in choices:
            for found in (self._overrides(paths, group.width), self._lists(paths, group.width)):
                if any(group.name in knob.groups for knob in found):
                    return found
        return []

    def _overrides(self, paths: tuple[Path, ...], width: int) -> list[ConfigKnob]:
        """The class may take values of its own for each layer under ``per_layer_config``, which every config
        has.
        """
        found: list[ConfigKnob] = []
        for layer in map(str, range(len(self.experiments.shapes))):
            fields = tuple(
                ((*path[:-1], "per_layer_config", layer, path[-1]), self._numbers[path]) for path in paths
            )
            first = ConfigKnob(fields, width, {}).lowered(_tries(width)[0])
            if isinstance(self.experiments.build(first), str):
                break  # no such layer, or no such thing
            found += filter(None, [self._knob(fields, width)])
        return found

    def _lists(self, paths: tuple[Path, ...], width: int) -> list[ConfigKnob]:
        """The class may take a list with a value for each layer; how many there are is some number of the
        config.
        """
        most = len(self.experiments.shapes)
        for count in sorted({value for value in self._numbers.values() if 1 < value <= most}):
            lists = {path: [self._numbers[path]] * count for path in paths}
            if self.experiments.build(lists) != self.experiments.shapes:
                continue
            layers = [tuple(((*path, at), self._numbers[path]) for path in paths) for at in range(count)]
            if found := [knob for fields in layers if (knob := self._knob(fields, width, lists))]:
                return found
        return []

    def _reason(self, group: Group) -> str:
        """What the fields that shrink this group do besides, or fail to do."""
        units, remarks = self._units[group.name], []
        for path in self._multiples(group):
            lost = self._alone(path, group.width)
            if isinstance(lost, str) or not _touches(lost, units):
                continue
            also = sorted(name for name, _ in lost.keys() - self._within)
            missed = sorted(name for name, _ in units.keys() - lost.keys())
            fault = f"leaves {missed[0]} as it is" if missed else "changes some of it by another amount"
            remarks.append(f"{written(path)} {f'changes {also[0]} as well' if also else fault}")
        (name, dim), *_ = units
        nothing = f"none that is a multiple of {group.width} changes dimension {dim} of {name}"
        return f"no field of {self.experiments.name} can say it: {'; '.join(remarks[:3]) or nothing}"


def _units(group: Group) -> Losses:
    """By how much each dimension of each member shrinks for each channel set that every block of the group
    loses.
    """
    return {
        (member.name, member.dim): len(member.indices) // (group.width * member.blocks)
        for member in (*group.producers, *group.consumers)
    }


def _tries(width: int) -> list[int]:
    """Steps to try: all of them where they are few, and halves first, which divide well."""
    if width <= _FEW:
        return sorted(range(1, width), key=lambda steps: (width % steps, -steps))
    return [width // 2, width // 4, 1]


def _combined(paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    return [found for count in range(1, _TOGETHER + 1) for found in combinations(paths, count)]


def _touches(lost: Losses | str, units: Losses) -> bool:
    return not isinstance(lost, str) and bool(lost.keys() & units.keys())
