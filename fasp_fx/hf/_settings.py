"""How far each dial of a config is turned: the sparsity, within what the config can say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ..allocation._allocation import (
    Allocation,
    Budget,
    CostAllocation,
    Target,
    lost_per_block,
    uniform,
    validate,
)
from ..allocation.costs import CostCurve, Costs
from ..analysis.groups import Group
from ..analysis.resources import most_lost
from ..errors import CaptureError, NothingPrunableError, SparsityError
from ..pruning.submodules._analysis import Joined
from ._dials import Dial, Family, Search
from ._experiments import Assignment, Experiments, Path

_NEGLIGIBLE = 1e-12


class _DialBudget(Budget):
    """A budget in which a dial stands for all its groups, with some losses already settled.

    Args:
        whole: the budget of all groups.
        dials: the dials that are free; ``groups`` holds the narrowest group of each.
        settled: channel sets per block that other groups lose.
    """

    def __init__(self, whole: Budget, dials: Sequence[Dial], settled: Mapping[str, int]) -> None:
        by_name = {group.name: group for group in whole.groups}
        super().__init__(
            [by_name[min(dial.groups, key=dial.groups.__getitem__)] for dial in dials], whole.limits
        )
        self.whole, self.dials, self.settled = whole, dials, settled

    def losses(self, turned: Sequence[int]) -> dict[str, int]:
        """Channel sets per block that each group loses."""
        return {
            **self.settled,
            **{
                name: times * turns
                for dial, turns in zip(self.dials, turned, strict=True)
                for name, times in dial.groups.items()
            },
        }

    def joined(self, costs: Costs) -> Costs:
        """The cost curve of each dial, by the name of the group that stands for it: of all groups that it
        turns.
        """
        curves = {}
        for dial, group in zip(self.dials, self.groups, strict=True):
            own = [costs[name].losses[::times] for name, times in dial.groups.items()]
            curves[group.name] = CostCurve(np.sum([losses[: min(map(len, own))] for losses in own], 0))
        return costs.with_curves(curves)

    def counts(self, lost: Sequence[int]) -> list[int]:
        losses = self.losses(lost)
        return self.whole.counts([losses.get(group.name, 0) for group in self.whole.groups])

    def sparsity(self, lost: Sequence[int]) -> float:
        """The sparsity when the dials are turned so far."""
        return self.removed(lost)[0]


@dataclass(frozen=True)
class _Level:
    """Whole heads that go: the fraction, and how far each dial of heads is turned for it."""

    fraction: float
    turned: tuple[int, ...]


class Settings:
    """An allocation (see :data:`fasp_fx.allocation.Allocation`) that stays within what a config can say.

    Neurons and other channels carry the sparsity. Whole heads are coarse: they go when they are asked for, or
    when the sparsity is out of reach without.

    Args:
        experiments: builds the model's class.
        heads_asked: whether whole heads shall go like all else, rather than only where nothing else is left.
        allocate: how the channels share what is to go; it sees one group for each dial.
        by_layer: whether layers may differ, where the class takes values by layer.

    Attributes:
        unsaid: for each group that no field can shrink alone, why; known once the allocation was made.
        losses: channel sets per block that each group loses; likewise.
    """

    def __init__(
        self,
        experiments: Experiments,
        heads_asked: bool,
        allocate: Allocation = uniform,
        by_layer: bool = True,
    ) -> None:
        self.experiments, self.heads_asked, self.allocate, self.by_layer = (
            experiments,
            heads_asked,
            allocate,
            by_layer,
        )
        self.unsaid: dict[str, str] = {}
        self.losses: dict[str, int] = {}
        self._families: list[Family] = []

    def __call__(self, budget: Budget, round_to: int, costs: Costs | None = None) -> list[int]:
        """Channel sets lost per block of each group.

        Raises:
            NothingPrunableError: the config can say nothing.
            SparsityError: it cannot say enough, or its smallest step is too large.
        """
        sparsity, heads, channels, level = self._planned(budget, round_to)
        free = _DialBudget(budget, channels, _DialBudget(budget, heads, {}).losses(level.turned))
        wanted = validate(self._shared(free, round_to, costs), free) if channels else []
        turned = [_possible(dial, turns) for dial, turns in zip(channels, wanted, strict=True)]
        self.losses = {name: lost for name, lost in free.losses(turned).items() if lost}
        if not self.losses:
            raise SparsityError(
                f"sparsity={sparsity:.4g} is less than half a step of what {self.experiments.name} can say;"
                " ask for more"
            )
        return [self.losses.get(group.name, 0) for group in budget.groups]

    def _planned(self, budget: Budget, round_to: int) -> tuple[float, list[Dial], list[Dial], _Level]:
        """The sparsity, the dials of heads and those of channels, and how many heads go; errors as for a
        call.
        """
        (limit,) = budget.limits
        assert isinstance(limit, Target)  # other budgets are refused before
        if isinstance(limit.resource, Joined):
            raise CaptureError(
                "the model cannot be captured as a whole, which a plain checkpoint needs; prune it without"
                " plain"
            )
        by_layer = self.by_layer and self.allocate is not uniform
        search = Search(self.experiments, budget.groups, by_layer=by_layer)
        self._families, self.unsaid = search.families, search.unsaid
        if not search.families:
            raise NothingPrunableError("; ".join(dict.fromkeys(search.unsaid.values())))
        dials = [dial for family in search.families for dial in family.fine or family.joint[:1]]
        by_name = {group.name: group for group in budget.groups}
        heads = [dial for dial in dials if _of_heads(dial, by_name)]
        channels = [dial for dial in dials if dial not in heads]
        return limit.sparsity, heads, channels, self._level(budget, heads, channels, limit.sparsity, round_to)

    def assignments(self) -> Iterator[dict[Path, int]]:
        """The values of the config's fields that say what was allocated: more than one where shapes do not
        tell rivals apart.
        """
        choices: list[list[Assignment]] = []
        for family in self._families:
            wanted = {name: self.losses.get(name, 0) for name in family.groups}
            said = [
                dial.set(turned) for dial in family.joint if (turned := _turned(dial, wanted)) is not None
            ]
            if not said:
                said = [
                    {
                        path: value
                        for dial in family.fine
                        if (turned := _turned(dial, wanted))
                        for path, value in dial.set(turned).items()
                    }
                ]
            choices.append([assignment if any(wanted.values()) else {} for assignment in said])
        for chosen in product(*choices):
            yield {path: value for assignment in chosen for path, value in assignment.items()}

    def _shared(self, free: _DialBudget, round_to: int, costs: Costs | None) -> list[int]:
        """How far the dials of channels are turned."""
        if not isinstance(self.allocate, CostAllocation):
            return self.allocate(free, round_to)
        assert costs is not None
        return self.allocate(free, round_to, free.joined(costs))

    def _level(
        self, budget: Budget, heads: Sequence[Dial], channels: Sequence[Dial], sparsity: float, round_to: int
    ) -> _Level:
        """How many heads go."""
        levels = _levels(heads)
        spans = [self._span(budget, heads, channels, level, round_to) for level in levels]
        most = max(high for _, high in spans)
        if sparsity > most + _NEGLIGIBLE:
            raise SparsityError(
                f"sparsity={sparsity:.4g} is out of reach: {self.experiments.name} can say at most"
                f" {np.floor(most * 1e4) / 1e4:.4f}"
                + (f" with round_to={round_to}" if round_to > 1 else "")
                + "; ask for less, or prune without plain"
            )
        if not channels:
            return min(zip(levels, spans, strict=True), key=lambda pair: abs(pair[1][0] - sparsity))[0]
        fitting = [
            level
            for level, (low, high) in zip(levels, spans, strict=True)
            if low <= sparsity <= high + _NEGLIGIBLE
        ]
        if not fitting:  # between what two numbers of heads can give
            return min(
                zip(levels, spans, strict=True),
                key=lambda pair: min(abs(bound - sparsity) for bound in pair[1]),
            )[0]
        if not self.heads_asked:
            return fitting[0]
        return min(
            fitting, key=lambda level: abs(self._at(budget, heads, channels, level, round_to) - sparsity)
        )

    def _span(
        self, budget: Budget, heads: Sequence[Dial], channels: Sequence[Dial], level: _Level, round_to: int
    ) -> tuple[float, float]:
        """The sparsities in reach when these heads go."""
        free = _DialBudget(budget, channels, _DialBudget(budget, heads, {}).losses(level.turned))
        return free.sparsity([0] * len(channels)), free.sparsity(
            [most_lost(group, round_to) for group in free.groups]
        )

    def _at(
        self, budget: Budget, heads: Sequence[Dial], channels: Sequence[Dial], level: _Level, round_to: int
    ) -> float:
        """The sparsity when channels lose the same fraction as heads."""
        free = _DialBudget(budget, channels, _DialBudget(budget, heads, {}).losses(level.turned))
        return free.sparsity([lost_per_block(group.width, level.fraction, round_to) for group in free.groups])


class CostSettings(Settings, CostAllocation):
    """Settings whose channels are shared out by what they cost."""

    def check(self, budget: Budget, round_to: int) -> None:
        """Refuse what the config cannot say; errors as for a call."""
        self._planned(budget, round_to)


def settings_of(
    experiments: Experiments, heads_asked: bool, allocate: Allocation, by_layer: bool
) -> Settings:
    """An allocation that stays within what a config can say, and shares out channels as another does."""
    return (CostSettings if isinstance(allocate, CostAllocation) else Settings)(
        experiments, heads_asked, allocate, by_layer
    )


def _of_heads(dial: Dial, groups: Mapping[str, Group]) -> bool:
    return any(groups[name].granularity == "head" for name in dial.groups)


def _levels(heads: Sequence[Dial]) -> list[_Level]:
    """The numbers of heads that can go, from none to all but one; dials of fewer turns wait until theirs is
    reached.
    """
    fractions = sorted(
        {turned / dial.width for dial in heads for turned in dial.turns or range(1, dial.width)}
    )
    return [
        _Level(
            fraction,
            tuple(
                max(
                    (
                        t
                        for t in dial.turns or range(1, dial.width)
                        if t / dial.width <= fraction + _NEGLIGIBLE
                    ),
                    default=0,
                )
                for dial in heads
            ),
        )
        for fraction in (0.0, *fractions)
    ]


def _possible(dial: Dial, turned: int) -> int:
    """The nearest that a dial can be turned."""
    return turned if dial.turns is None else min((0, *dial.turns), key=lambda turns: abs(turns - turned))


def _turned(dial: Dial, wanted: Mapping[str, int]) -> int | None:
    """How far a dial is turned for these losses, or ``None`` if it cannot give them."""
    turns = {wanted[name] / times for name, times in dial.groups.items()}
    if len(turns) != 1 or (turned := turns.pop()) != int(turned):
        return None
    allowed = turned == 0 or dial.turns is None or int(turned) in dial.turns
    return int(turned) if allowed else None
