"""Which fields of a config shrink which coupled groups, found by lowering them one, two and three at a time;
and how far each is lowered: the sparsity, within what the config can say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np

from ..allocation import Allocation, Budget, CostAllocation, Target, lost_per_block, uniform, validate
from ..allocation.costs import CostCurve, Costs
from ..analysis.groups import Group
from ..analysis.resources import most_lost
from ..errors import CaptureError, NothingPrunableError, SparsityError
from ..pruning.submodules._analysis import Joined
from ._experiments import Assignment, Experiments, Path, written

#: the most fields that are lowered together
_TOGETHER = 3
#: up to this many channel sets, each number of them is tried
_FEW = 64
#: the most candidates combined for one group
_CANDIDATES = 8

_NEGLIGIBLE = 1e-12

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


#: knobs that do the same to the same groups, one of which is to be turned: shapes cannot tell them apart,
#: what they compute does
Rivals = tuple[ConfigKnob, ...]


class KnobSearch:
    """Finds the knobs of some groups.

    Args:
        experiments: builds the model's class.
        groups: the groups that may be pruned; their members are named as in ``experiments.shapes``.

    Attributes:
        rivals: what was found; no group is in two.
        inexpressible: for each group that no field can shrink alone, why.
    """

    def __init__(self, experiments: Experiments, groups: Sequence[Group]) -> None:
        self.experiments = experiments
        self._units = {group.name: _units(group) for group in groups}
        self._width = {group.name: group.width for group in groups}
        self._within = {place for units in self._units.values() for place in units}
        self._numbers = experiments.numbers()
        self.rivals: list[Rivals] = []
        known: set[str] = set()
        for group in groups:
            knobs = [] if group.name in known else self._knobs(group)
            if knobs := [knob for knob in knobs if not known & knob.groups.keys()]:
                first = knobs[0].groups, knobs[0].width
                self.rivals.append(tuple(knob for knob in knobs if (knob.groups, knob.width) == first))
                known |= first[0].keys()
        self.inexpressible = {group.name: self._reason(group) for group in groups if group.name not in known}

    def _knobs(self, group: Group) -> list[ConfigKnob]:
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
        candidates = (touching + unbuilt)[:_CANDIDATES]
        for paths in (paths for count in range(_TOGETHER) for paths in combinations(candidates, count + 1)):
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

    def _knob(self, fields: tuple[tuple[Path, int], ...], width: int) -> ConfigKnob | None:
        """The knob of these fields, if at every step that can be built they shrink groups and nothing else,
        in proportion.
        """
        knob = ConfigKnob(fields, width, {})
        built: list[int] = []
        for steps in _tries(width):
            lost = self.experiments.losses(knob.lowered(steps))
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

    def _reason(self, group: Group) -> str:
        """What the fields that shrink this group do besides, or fail to do."""
        units, remarks = self._units[group.name], []
        for path in self._multiples(group):
            lost = self._alone(path, group.width)
            if isinstance(lost, str) or not _touches(lost, units):
                continue
            also = sorted(name for name, _ in lost.keys() - self._within)
            fault = f"changes {also[0]} as well" if also else "changes a part of it alone"
            remarks.append(f"{written(path)} {fault}")
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


def _touches(lost: Losses | str, units: Losses) -> bool:
    return not isinstance(lost, str) and bool(lost.keys() & units.keys())


class _KnobBudget(Budget):
    """A budget in which a knob stands for all its groups, with some losses already settled.

    Args:
        whole: the budget of all groups.
        knobs: the knobs that are free; ``groups`` holds the narrowest group of each.
        settled: channel sets per block that other groups lose.
    """

    def __init__(self, whole: Budget, knobs: Sequence[ConfigKnob], settled: Mapping[str, int]) -> None:
        by_name = {group.name: group for group in whole.groups}
        narrowest = [min(knob.groups, key=knob.groups.__getitem__) for knob in knobs]
        super().__init__([by_name[name] for name in narrowest], whole.limits)
        self.whole, self.knobs, self.settled = whole, knobs, settled

    def losses(self, lowered: Sequence[int]) -> dict[str, int]:
        """Channel sets per block that each group loses."""
        found = dict(self.settled)
        for knob, steps in zip(self.knobs, lowered, strict=True):
            found |= {name: times * steps for name, times in knob.groups.items()}
        return found

    def joined(self, costs: Costs) -> Costs:
        """The cost curve of each knob, by the name of the group that stands for it: of all groups that it
        shrinks.
        """
        curves = {}
        for knob, group in zip(self.knobs, self.groups, strict=True):
            own = [costs[name].losses[::times] for name, times in knob.groups.items()]
            curves[group.name] = CostCurve(np.sum([losses[: min(map(len, own))] for losses in own], 0))
        return costs.with_curves(curves)

    def counts(self, lost: Sequence[int]) -> list[int]:
        losses = self.losses(lost)
        return self.whole.counts([losses.get(group.name, 0) for group in self.whole.groups])

    def sparsity(self, lost: Sequence[int]) -> float:
        """The sparsity when the knobs are lowered so far."""
        return self.removed(lost)[0]


class Settings:
    """An allocation (see :data:`fasp_fx.allocation.Allocation`) that stays within what a config can say.

    Neurons and other channels carry the sparsity. Whole heads are coarse: they go when they are asked for, or
    when the sparsity is out of reach without.

    Args:
        experiments: builds the model's class.
        heads_asked: whether whole heads shall go like all else, rather than only where nothing else is left.
        allocate: how the channels share what is to go; it sees one group for each knob.

    Attributes:
        inexpressible: for each group that no field can shrink alone, why; known once the allocation was made.
        losses: channel sets per block that each group loses; likewise.
    """

    def __init__(self, experiments: Experiments, heads_asked: bool, allocate: Allocation = uniform) -> None:
        self.experiments, self.heads_asked, self.allocate = experiments, heads_asked, allocate
        self.inexpressible: dict[str, str] = {}
        self.losses: dict[str, int] = {}
        self._rivals: list[Rivals] = []

    def __call__(self, budget: Budget, round_to: int, costs: Costs | None = None) -> list[int]:
        """Channel sets lost per block of each group.

        Raises:
            NothingPrunableError: the config can say nothing.
            SparsityError: it cannot say enough, or its smallest step is too large.
        """
        sparsity, free = self._planned(budget, round_to)
        lowered = []
        if free.knobs:
            if isinstance(self.allocate, CostAllocation):
                assert costs is not None
                wanted = self.allocate(free, round_to, free.joined(costs))
            else:
                wanted = self.allocate(free, round_to)
            wanted = validate(wanted, free)
            lowered = [
                min((0, *knob.possible()), key=lambda own: abs(own - steps))
                for knob, steps in zip(free.knobs, wanted, strict=True)
            ]
        self.losses = {name: lost for name, lost in free.losses(lowered).items() if lost}
        if not self.losses:
            raise SparsityError(
                f"sparsity={sparsity:.4g} is less than half a step of what {self.experiments.name} can say;"
                " ask for more"
            )
        return [self.losses.get(group.name, 0) for group in budget.groups]

    def _planned(self, budget: Budget, round_to: int) -> tuple[float, _KnobBudget]:
        """The sparsity, and the budget of the knobs of channels, with the heads that go settled; errors as
        for a call.
        """
        (limit,) = budget.limits
        assert isinstance(limit, Target)  # other budgets are refused before
        if isinstance(limit.resource, Joined):
            raise CaptureError(
                "the model cannot be captured as a whole, which a plain checkpoint needs; prune it without"
                " plain"
            )
        search = KnobSearch(self.experiments, budget.groups)
        self._rivals, self.inexpressible = search.rivals, search.inexpressible
        if not search.rivals:
            raise NothingPrunableError("; ".join(dict.fromkeys(search.inexpressible.values())))
        knobs = [knob for knob, *_ in search.rivals]
        whole = {group.name for group in budget.groups if group.granularity == "head"}
        heads = [knob for knob in knobs if whole & knob.groups.keys()]
        channels = [knob for knob in knobs if knob not in heads]
        return limit.sparsity, self._with_heads(budget, heads, channels, limit.sparsity, round_to)

    def assignments(self) -> Iterator[dict[Path, int]]:
        """The values of the config's fields that say what was allocated: more than one where shapes do not
        tell rivals apart.
        """
        choices: list[list[Assignment]] = []
        for rivals in self._rivals:
            name, times = next(iter(rivals[0].groups.items()))  # rivals take the same from the same groups
            steps = self.losses.get(name, 0) // times
            fitting = [knob for knob in rivals if steps in knob.possible()]
            choices.append([knob.lowered(steps) for knob in fitting] if steps else [{}])
        for chosen in product(*choices):
            yield {path: value for assignment in chosen for path, value in assignment.items()}

    def _with_heads(
        self,
        budget: Budget,
        heads: Sequence[ConfigKnob],
        channels: Sequence[ConfigKnob],
        sparsity: float,
        round_to: int,
    ) -> _KnobBudget:
        """The budget of channels once it is settled how many heads go: from none to all but one; a knob of
        fewer steps waits until its next is reached.
        """
        fractions = (0.0, *sorted({steps / knob.width for knob in heads for steps in knob.possible()}))
        levels = []  # fraction of heads, the budget of channels then, and the sparsities in reach
        for fraction in fractions:
            reached = [
                max((s for s in knob.possible() if s / knob.width <= fraction + _NEGLIGIBLE), default=0)
                for knob in heads
            ]
            free = _KnobBudget(budget, channels, _KnobBudget(budget, heads, {}).losses(reached))
            high = free.sparsity([most_lost(group, round_to) for group in free.groups])
            levels.append((fraction, free, free.sparsity([0] * len(channels)), high))
        most = max(high for *_, high in levels)
        if sparsity > most + _NEGLIGIBLE:
            raise SparsityError(
                f"sparsity={sparsity:.4g} is out of reach: {self.experiments.name} can say at most"
                f" {np.floor(most * 1e4) / 1e4:.4f}"
                + (f" with round_to={round_to}" if round_to > 1 else "")
                + "; ask for less, or prune without plain"
            )
        fitting = [level for level in levels if level[2] <= sparsity <= level[3] + _NEGLIGIBLE]
        if not channels or not fitting:  # between what two numbers of heads can give
            return min(levels, key=lambda level: min(abs(bound - sparsity) for bound in level[2:]))[1]
        if not self.heads_asked:
            return fitting[0][1]

        def alike(level: tuple[float, _KnobBudget, float, float]) -> float:
            """How far off the sparsity is when channels lose the same fraction as heads."""
            fraction, free, *_ = level
            lost = [lost_per_block(group.width, fraction, round_to) for group in free.groups]
            return abs(free.sparsity(lost) - sparsity)

        return min(fitting, key=alike)[1]


class CostSettings(Settings, CostAllocation):
    """Settings whose channels are shared out by what they cost."""

    def check(self, budget: Budget, round_to: int) -> None:
        """Refuse what the config cannot say; errors as for a call."""
        self._planned(budget, round_to)
