"""How far each knob of a config is lowered: the sparsity, within what the config can say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np

from ..allocation import Allocation, Budget, CostAllocation, Target, lost_per_block, uniform, validate
from ..allocation.costs import CostCurve, Costs
from ..analysis.resources import most_lost
from ..errors import CaptureError, NothingPrunableError, SparsityError
from ..pruning.submodules._analysis import Joined
from ._experiments import Assignment, Experiments, Path
from ._knobs import ConfigKnob, Family, KnobSearch

_NEGLIGIBLE = 1e-12


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
        by_layer: whether layers may differ, where the class takes values by layer.

    Attributes:
        inexpressible: for each group that no field can shrink alone, why; known once the allocation was made.
        losses: channel sets per block that each group loses; likewise.
    """

    def __init__(
        self,
        experiments: Experiments,
        heads_asked: bool,
        allocate: Allocation = uniform,
        by_layer: bool = True,
    ) -> None:
        self.experiments, self.heads_asked, self.allocate = experiments, heads_asked, allocate
        self.by_layer = by_layer and allocate is not uniform
        self.inexpressible: dict[str, str] = {}
        self.losses: dict[str, int] = {}
        self._families: list[Family] = []

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
            lowered = [_nearest(knob, steps) for knob, steps in zip(free.knobs, wanted, strict=True)]
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
        search = KnobSearch(self.experiments, budget.groups, by_layer=self.by_layer)
        self._families, self.inexpressible = search.families, search.inexpressible
        if not search.families:
            raise NothingPrunableError("; ".join(dict.fromkeys(search.inexpressible.values())))
        knobs = [knob for family in search.families for knob in family.per_layer or family.shared[:1]]
        whole = {group.name for group in budget.groups if group.granularity == "head"}
        heads = [knob for knob in knobs if whole & knob.groups.keys()]
        channels = [knob for knob in knobs if knob not in heads]
        return limit.sparsity, self._with_heads(budget, heads, channels, limit.sparsity, round_to)

    def assignments(self) -> Iterator[dict[Path, int]]:
        """The values of the config's fields that say what was allocated: more than one where shapes do not
        tell rivals apart.
        """
        choices: list[list[Assignment]] = []
        for family in self._families:
            wanted = {name: self.losses.get(name, 0) for name in family.groups}
            shared = [(knob, _steps(knob, wanted)) for knob in family.shared]
            own = [(knob, _steps(knob, wanted)) for knob in family.per_layer]
            found = [knob.lowered(steps) for knob, steps in shared if steps is not None]
            layers = [knob.lowered(steps).items() for knob, steps in own if steps]
            found = found or [{path: value for layer in layers for path, value in layer}]
            choices.append([*found] if any(wanted.values()) else [{}])
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


def settings_of(
    experiments: Experiments, heads_asked: bool, allocate: Allocation, by_layer: bool
) -> Settings:
    """An allocation that stays within what a config can say, and shares out channels as another does."""
    kind = CostSettings if isinstance(allocate, CostAllocation) else Settings
    return kind(experiments, heads_asked, allocate, by_layer)


def _nearest(knob: ConfigKnob, steps: int) -> int:
    """The nearest that a knob can be lowered."""
    return steps if knob.steps is None else min((0, *knob.steps), key=lambda own: abs(own - steps))


def _steps(knob: ConfigKnob, wanted: Mapping[str, int]) -> int | None:
    """How far a knob is lowered for these losses, or ``None`` if it cannot give them."""
    steps = {wanted[name] / times for name, times in knob.groups.items()}
    found = steps.pop()
    return int(found) if not steps and (found == 0 or found in knob.possible()) else None
