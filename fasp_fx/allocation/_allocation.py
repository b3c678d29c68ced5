"""How many channel sets each group loses, so that no more of a resource stays than may."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise

import numpy as np

from fasp_fx.analysis import EXEMPT, Group
from fasp_fx.errors import ArgumentError

from ._costs import Costs
from ._limits import Budget, check_reach, lost_per_block


class CostAllocation(ABC):
    """An allocation that wants to know what each group costs; the cost curves are measured before it is
    asked.

    Examples:
        >>> from fasp_fx.allocation import CostAllocation
        >>> class Cheapest(CostAllocation):  # from one group alone, the one that costs least
        ...     def __call__(self, budget, round_to, costs):
        ...         least = min(budget.groups, key=lambda group: costs[group.name].losses[-1])
        ...         taken = [group is least for group in budget.groups]
        ...         return budget.closest([[count * each for each in taken] for count in range(least.width)])
        >>> smaller = fasp_fx.prune(captured, calibration=batches, allocation=Cheapest(), sparsity=0.3)
        >>> smaller.report.parameters
        (884, 625)
    """

    @abstractmethod
    def __call__(self, budget: Budget, round_to: int | None, costs: Costs) -> list[int]:
        """The channel sets that each block of each of the budget's groups loses."""

    def check(self, budget: Budget, round_to: int | None) -> None:
        """Refuse, before costs are measured, a budget that cannot be met.

        Raises:
            SparsityError, BudgetError: see :func:`check_reach`.
        """
        check_reach(budget, round_to)


#: an allocation maps a budget and ``round_to`` to the channel sets that each block of each of the budget's
#: groups loses
Allocation = Callable[[Budget, int | None], list[int]] | CostAllocation


def uniform(budget: Budget, round_to: int | None) -> list[int]:
    """Channel sets lost per block of each group: the same fraction of every group, found by bisection.

    The nearest rounded widths serve. Under a ceiling, what the last steps took too much is given back, where
    the largest fraction is gone.

    Raises:
        SparsityError, BudgetError: see :func:`check_reach`.

    Examples:
        >>> from fasp_fx.allocation import uniform
        >>> even = fasp_fx.prune(captured, calibration=batches, allocation=uniform, sparsity=0.3)
        >>> {group.name: group.removed_sets for group in even.plan.groups}
        {'2.weight': 8, '4.weight': 4}
    """
    check_reach(budget, round_to)

    def lost(fraction: float) -> list[int]:
        return [
            lost_per_block(group.width, fraction, group.step(round_to), group.needed)
            for group in budget.groups
        ]

    whole = 2**60
    enough = bisect_left(range(whole), True, key=lambda part: budget.over(lost(part / whole)) <= 0)
    nearest = budget.closest([lost(max(enough - 1, 0) / whole), lost(enough / whole)])
    return _given_back(budget, round_to, nearest, lambda at, count, _: count / budget.groups[at].width)


class Global(CostAllocation):
    """One threshold for all groups: channel sets go where a weight removed costs least, by the lower convex
    hulls of the cost curves.

    Within what steps of whole channel sets allow, this is the least sum of predicted losses for the sparsity
    (Shoham and Gersho, 1988; for pruning ZipLM, arXiv 2302.04089, section 3). A budget of another resource is
    met in the same way, by what a channel set takes of that one.

    Under several budgets each of them is tried as the one that says what a channel set is worth, and so is
    what a channel set takes of all of them, each as a part of what has to go of it. The least predicted loss
    counts.

    What the last step took too much of a budget is given back, where it costs most.

    Examples:
        >>> from fasp_fx.allocation import Global
        >>> fasp_fx.prune(captured, calibration=batches, allocation=Global(), sparsity=0.3).report.parameters
        (884, 584)
    """

    #: how often what a channel set takes along is counted anew, where groups share weights
    passes = 3

    def __call__(self, budget: Budget, round_to: int | None, costs: Costs) -> list[int]:
        """Channel sets lost per block of each group.

        Raises:
            SparsityError, BudgetError: see :func:`check_reach`.
            ArgumentError: a group has no cost curve.
        """
        check_reach(budget, round_to)
        curves = [_steps(group, round_to, costs) for group in budget.groups]
        needs = np.array([max(limit.need, 1e-12) for limit in budget.limits])
        several = np.stack([*np.eye(len(needs)), 1 / needs]) if len(needs) > 1 else np.ones((1, 1))
        tried = [self._by_threshold(budget, curves, prices) for prices in several]
        losses = [costs[group.name].losses for group in budget.groups]
        tried = [
            _given_back(budget, round_to, lost, lambda at, more, fewer: losses[at][more] - losses[at][fewer])
            for lost in tried
        ]
        return min(tried, key=lambda lost: sum(each[count] for each, count in zip(losses, lost, strict=True)))

    def _by_threshold(self, budget: Budget, curves: Sequence[_Curve], prices: np.ndarray) -> list[int]:
        """What goes when a channel set is worth what it takes of each resource, times its price."""
        lost = [0] * len(curves)
        for _ in range(self.passes):
            worth = budget.effects(lost) @ prices
            moves = sorted(
                (slope / share if share > 0 else np.inf, index, first, last)
                for index, (curve, share) in enumerate(zip(curves, worth, strict=True))
                for slope, first, last in _hull(*curve)
            )
            before, lost = lost, _down_to(budget, curves, moves)
            if lost == before:
                break
        return lost


#: how many channel sets of a block can go, and the loss of each
_Curve = tuple[np.ndarray, np.ndarray]


def _steps(group: Group, round_to: int | None, costs: Costs) -> _Curve:
    if group.name not in costs or len(costs[group.name].losses) <= group.deepest_loss:
        raise ArgumentError(
            f"there is no cost curve for '{group.name}' up to {group.deepest_loss} channel sets of a block;"
            " measure with the granularity= and include= of the pruning"
        )
    counts = np.array(_counts(group, round_to))
    return counts, costs[group.name].losses[counts]


def _counts(group: Group, round_to: int | None) -> list[int]:
    """How many channel sets of a block can go."""
    step, counts = group.step(round_to), range(1, group.deepest_loss + 1)
    return [0, *(count for count in counts if (group.width - count) % step == 0)]


def _hull(counts: np.ndarray, losses: np.ndarray) -> list[tuple[float, int, int]]:
    """The lower convex hull of a curve: slope, first and last place of each of its edges."""
    hull = [0]
    for place in range(1, len(counts)):
        while len(hull) > 1 and _slope(counts, losses, hull[-2], hull[-1]) >= _slope(
            counts, losses, hull[-1], place
        ):
            hull.pop()
        hull.append(place)
    return [(_slope(counts, losses, first, last), first, last) for first, last in pairwise(hull)]


def _slope(counts: np.ndarray, losses: np.ndarray, first: int, last: int) -> float:
    return float((losses[last] - losses[first]) / (counts[last] - counts[first]))


def _down_to(
    budget: Budget, curves: Sequence[_Curve], moves: Sequence[tuple[float, int, int, int]]
) -> list[int]:
    """Make the moves in their order until the budget is met, the last of them as far as it takes."""

    def after(count: int, part: int | None = None) -> list[int]:
        places = {index: last for _, index, _, last in moves[:count]}
        places |= {} if part is None else {moves[count][1]: part}
        return [int(counts[places.get(index, 0)]) for index, (counts, _) in enumerate(curves)]

    if not moves:
        return after(0)
    # After so many moves too little is gone, and after one more enough.
    count = bisect_left(range(1, len(moves)), True, key=lambda count: budget.over(after(count)) <= 0)
    _, _, first, last = moves[count]
    return budget.closest(after(count, place) for place in range(first, last + 1))


def _given_back(
    budget: Budget, round_to: int | None, lost: Sequence[int], worth: Callable[[int, int, int], float]
) -> list[int]:
    """Under a ceiling, leave channel sets where they are as long as the budget is met without, step by step.

    Args:
        worth: of giving back one step: the place of the group, and what it loses before and after; the
            largest goes first.
    """
    lost, counts = list(lost), [_counts(group, round_to) for group in budget.groups]
    places = {index: bisect_left(counts[index], count) for index, count in enumerate(lost)}
    waiting = {index: place for index, place in places.items() if place and budget.is_ceiling}
    while waiting:
        index = max(waiting, key=lambda index: worth(index, lost[index], counts[index][waiting[index] - 1]))
        place = waiting.pop(index) - 1
        fewer = _with(lost, index, counts[index][place])
        if budget.over(fewer) <= 0:
            lost = fewer
            waiting |= {index: place} if place else {}
    return lost


# --- Search: what an allocation really costs is found out by trying it.


#: at most so many pairs of groups exchange steps at once
PAIRS = 3
#: so many exchanges are drawn for each that is wanted: steps may be too coarse for most to keep the budget
ATTEMPTS = 50
#: a group loses more by at most this part of its channel sets, in the first generation and in the last
COARSE, FINE = 1 / 8, 1 / 64
#: all candidates of a generation are tried on one in so many sequences, and the best on all
PART = 4
#: how near to a sparsity an allocation is near enough
_NEAR = 1e-3


class Trial(ABC):
    """A way to find out what an allocation really costs.

    Attributes:
        count: how many calibration sequences there are to try it on.

    Examples:
        >>> from fasp_fx.allocation import Global, Search, uniform
        >>> class Better(Search):  # the better of two
        ...     def __call__(self, budget, round_to, costs, trial=None):
        ...         both = [Global()(budget, round_to, costs), uniform(budget, round_to)]
        ...         return min(both, key=lambda lost: sum(trial.losses(lost, range(trial.count))))
        >>> better = fasp_fx.prune(captured, calibration=batches, allocation=Better(), sparsity=0.3)
    """

    count: int

    @abstractmethod
    def losses(self, lost: Sequence[int], sequences: Sequence[int]) -> list[float]:
        """The loss of the pruned model on each of some sequences, infinite where it is not finite.

        Args:
            lost: channel sets that each block of each of the budget's groups loses.
            sequences: their numbers, from 0 to ``count - 1``.
        """

    def progress(self, fraction: float) -> None:  # noqa: B027
        """Say how much of a search is done."""

    def note(self, before: float, after: float, tried: int) -> None:  # noqa: B027
        """Say what came of a search: the mean loss over all sequences where it began and ended, and how many
        candidates were tried.
        """


def _neighbours(
    budget: Budget, counts: Sequence[Sequence[int]], lost: list[int], reach: float, draw: np.random.Generator
) -> Iterator[list[int]]:
    """Allocations in which some pairs of groups have exchanged steps, without end.

    Args:
        counts: for each group, how many channel sets a block can lose, in rising order.
        reach: the largest part of its channel sets that a group loses more in one exchange; a single step may
            always be exchanged.
    """
    free = [index for index, several in enumerate(counts) if len(several) > 1]
    while len(free) > 1:
        neighbour = lost
        for _ in range(int(draw.integers(1, PAIRS + 1))):
            more, less = draw.choice(free, 2, replace=False).tolist()
            up, down = counts[more], counts[less]
            step = int(draw.integers(1, max(round(reach * (len(up) - 1)), 1) + 1))
            raised = _with(neighbour, more, up[min(bisect_left(up, neighbour[more]) + step, len(up) - 1)])
            fewer = down[: bisect_left(down, neighbour[less])]
            # The least place at which enough goes.
            enough = bisect_left(fewer, True, key=lambda count: budget.over(_with(raised, less, count)) <= 0)
            places = (enough, max(enough - 1, 0))
            neighbour = budget.closest(_with(raised, less, down[place]) for place in places)
        yield neighbour


def _mean(losses: Sequence[float]) -> float:
    """The mean, which does not depend on the order."""
    return math.fsum(losses) / len(losses)


def _with(lost: Sequence[int], index: int, count: int) -> list[int]:
    return [*lost[:index], count, *lost[index + 1 :]]


class Search(CostAllocation):
    """An evolutionary search from what :class:`Global` finds, judged by running the pruned model.

    Cost curves are of single groups and to second order; what removals of many groups do to the whole model
    is found out by doing it. In each generation some candidates are drawn from the best allocation so far:
    one to three pairs of groups exchange steps of equal cost, one of the pair losing more, the other as much
    less as gives the budget back. Steps begin with up to an eighth of a group and end with up to a
    sixty-fourth, or single ones. Under ceilings, no more than they allow ever stays; a sparsity is met as
    nearly as at the start, or to a thousandth. All candidates are run on a quarter of the sequences; the best
    takes the place of the best so far where its loss over all of them is less, so that the search never ends
    worse there than it began. Evolutionary searches over what layers lose: EvoPress
    (Sieberling et al., arXiv 2410.14649), DarwinLM (Tang et al., 2502.07780) and Týr-the-Pruner (Li et al.,
    2503.09657).

    A candidate is run as the dense model with other weights: of each group, the first channel sets of one
    order go that was found on the dense model, and what reads them is repaired in closed form on the dense
    model's activations, with the ridge of :class:`fasp_fx.calibration.OBS`. What is removed in the end is
    chosen and repaired behind earlier removals, as always. Where removed channels cross a norm
    (``include=("approximate",)``) or experts go, norms and routers of a candidate still see the dense
    model's, as they do while a model is calibrated.

    The loss is, with ``loss="next-token"``, the mean over tokens of the Kullback-Leibler divergence KL(dense
    ‖ pruned) of the next token, over the 64 tokens that the dense model thinks most likely and all others as
    one; with ``"outputs"`` or without a loss, half the mean squared error of the outputs, relative to their
    mean square in the sequence; otherwise the mean of the terms of the caller's loss. Padding does not
    count; sequences count alike.

    Groups that no weight reads cannot be tried, and are refused, and so are formats of model files.

    Args:
        generations: how many times candidates are drawn.
        offspring: how many are drawn at a time.
        sequences: on how many calibration sequences candidates are judged, taken evenly from all of them;
            with a loss of the caller's, whole batches.
        seed: of what is drawn. The caller's random numbers go on as if nothing had been.

    Raises:
        ArgumentError: one of them is no positive integer, or the seed none from 0 on.

    Examples:
        >>> from fasp_fx.allocation import Search
        >>> search = Search(generations=1, offspring=2, sequences=8)
        >>> searched = fasp_fx.prune(captured, calibration=batches, allocation=search, sparsity=0.3)
    """

    def __init__(self, generations: int = 12, offspring: int = 12, sequences: int = 8, seed: int = 0) -> None:
        for name, value, least in (
            ("generations", generations, 1),
            ("offspring", offspring, 1),
            ("sequences", sequences, 1),
            ("seed", seed, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(
                    f"{name}={value!r} is not an integer from {least} on; leave it out for the default"
                )
        self.generations, self.offspring, self.sequences, self.seed = generations, offspring, sequences, seed

    def check(self, budget: Budget, round_to: int | None) -> None:
        """As for others; and groups that no weight reads are refused.

        Raises:
            ArgumentError: names one.
        """
        super().check(budget, round_to)
        unread = next((group for group in budget.groups if not group.uses and group.status == EXEMPT), None)
        if unread is not None:
            raise ArgumentError(
                f"allocation='search' cannot try '{unread.name}', which no weight reads; exclude it, or use"
                " allocation='global'"
            )

    def __call__(
        self, budget: Budget, round_to: int | None, costs: Costs, trial: Trial | None = None
    ) -> list[int]:
        """Channel sets lost per block of each group; arguments and errors as for :class:`Global`.

        Args:
            trial: runs candidates; without one, what the search would begin with.
        """
        best = Global()(budget, round_to, costs)
        if trial is None:
            return best
        counts = [_counts(group, round_to) for group in budget.groups]
        slack = max(abs(budget.over(best)), _NEAR)

        def is_met(lost: list[int]) -> bool:
            over = budget.over(lost)
            return over <= 0 if budget.is_ceiling else abs(over) <= slack

        first = least = _mean(trial.losses(best, range(trial.count)))
        tried = 0
        for generation in range(self.generations):
            draw = np.random.default_rng((self.seed, generation))
            reach = COARSE * (FINE / COARSE) ** (generation / max(self.generations - 1, 1))
            drawn = islice(_neighbours(budget, counts, best, reach, draw), ATTEMPTS * self.offspring)
            candidates = list(islice(filter(is_met, drawn), self.offspring))
            if candidates:
                some = draw.permutation(trial.count)[: -(-trial.count // PART)].tolist()
                candidate = min(candidates, key=lambda lost: _mean(trial.losses(lost, some)))
                loss = _mean(trial.losses(candidate, range(trial.count)))
                best, least = (candidate, loss) if loss < least else (best, least)
            tried += len(candidates)
            trial.progress((generation + 1) / self.generations)
        trial.note(first, least, tried)
        return best
