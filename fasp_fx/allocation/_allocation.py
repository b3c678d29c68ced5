"""How many channel sets each group loses, so that no more of a resource stays than may."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from ..analysis.groups import EXEMPT, Group
from ..errors import ArgumentError
from ._limits import Budget, check_reach, deepest_loss, lost_per_block
from ._search import Exchanges, Trial, evolve
from .costs import Costs

#: the part of a budget that steps of channel sets may leave over
FINE = 0.01


class CostAllocation(ABC):
    """An allocation that wants to know what each group costs; the cost curves are measured before it is
    asked.

    Attributes:
        averages: of groups that lose alike (``uniform_layers=True``) it is given the mean of the cost curves
            in the place of their sum.
    """

    averages: bool = False

    @abstractmethod
    def __call__(self, budget: Budget, round_to: int, costs: Costs) -> list[int]:
        """The channel sets that each block of each of the budget's groups loses."""

    def check(self, budget: Budget, round_to: int) -> None:
        """Refuse, before costs are measured, a budget that cannot be met.

        Raises:
            SparsityError, BudgetError: see :func:`check_reach`.
        """
        check_reach(budget, round_to)


#: an allocation maps a budget and ``round_to`` to the channel sets that each block of each of the budget's
#: groups loses
Allocation = Callable[[Budget, int], list[int]] | CostAllocation


def uniform(budget: Budget, round_to: int) -> list[int]:
    """Channel sets lost per block of each group: the same fraction of every group, found by bisection.

    The nearest rounded widths serve. Under a ceiling, what the last steps took too much is given back, where
    the largest fraction is gone.

    Raises:
        SparsityError, BudgetError: see :func:`check_reach`.
    """
    check_reach(budget, round_to)

    def lost(fraction: float) -> list[int]:
        return [
            lost_per_block(group.width, fraction, group.step(round_to), group.needed)
            for group in budget.groups
        ]

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if budget.over(lost(middle)) > 0 else (low, middle)
    found = budget.closest([lost(low), lost(high)])
    if not budget.is_ceiling:
        return found
    return _given_back(budget, round_to, found, lambda index, count, _: count / budget.groups[index].width)


class Global(CostAllocation):
    """One threshold for all groups: channel sets go where a weight removed costs least, by the lower convex
    hulls of the cost curves.

    Within what steps of whole channel sets allow, this is the least sum of predicted losses for the sparsity
    (Shoham and Gersho, 1988; for pruning ZipLM, arXiv 2302.04089, section 3). A budget of another resource is
    met in the same way, by what a channel set takes of that one.

    Under several budgets a channel set is worth what it takes of each resource, as a part of what has to go
    of that, times a price of the resource (the generalised Lagrange multipliers of Everett, 1963). Prices are
    found by multiplicative weights (Plotkin, Shmoys and Tardos, 1995; Arora, Hazan and Kale, 2012): channel
    sets go until all budgets are met, and a resource of which more went than had to becomes cheaper. The
    least predicted loss counts. Where one budget alone leads to all others, it is the only one with a price.

    What the last step took too much is given back, where it costs most; and where steps are so coarse that
    more than a hundredth of a budget is left over, steps are exchanged as long as that lowers the predicted
    loss.
    """

    #: how often what a channel set takes along is counted anew, where groups share weights
    passes = 3
    #: how often prices are found anew, where there are several budgets
    rounds = 12

    def __call__(self, budget: Budget, round_to: int, costs: Costs) -> list[int]:
        """Channel sets lost per block of each group.

        Raises:
            SparsityError, BudgetError: see :func:`check_reach`.
            ArgumentError: a group has no cost curve.
        """
        check_reach(budget, round_to)
        curves = [_steps(group, round_to, costs) for group in budget.groups]
        if len(budget.limits) == 1:
            found = self._by_threshold(budget, curves, np.ones(1))
            return _polished(budget, round_to, costs, found) if budget.is_ceiling else found
        needs = np.array([max(limit.need, 1e-12) for limit in budget.limits])
        tried: list[list[int]] = []

        def spare_at(prices: np.ndarray) -> np.ndarray:
            """Try prices: how much more of each resource went than had to."""
            found = self._by_threshold(budget, curves, prices / needs)
            tried.append(_polished(budget, round_to, costs, found))
            return (np.array(budget.removed(found)) - needs) / needs

        for index, price in enumerate(np.eye(len(needs))):
            if int(np.argmin(spare_at(price))) == index:
                return tried[-1]  # whoever keeps this budget keeps the others
        prices = np.ones(len(needs))
        for step in range(self.rounds):
            spare = spare_at(prices)
            prices *= np.exp(-spare / max(spare.max(), 1e-12) * 2 / (step + 1))
        met = [lost for lost in tried if budget.over(lost) <= 0] or tried
        return min(met, key=lambda lost: _predicted(budget, costs, lost))

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
            found = _down_to(budget, curves, moves)
            if found == lost:
                break
            lost = found
        return lost


#: how many channel sets of a block can go, and the loss of each
_Curve = tuple[np.ndarray, np.ndarray]


def _steps(group: Group, round_to: int, costs: Costs) -> _Curve:
    if group.name not in costs:
        raise ArgumentError(
            f"there is no cost curve for '{group.name}'; measure with the granularity= and include= of the"
            " pruning"
        )
    losses, most = costs[group.name].losses, deepest_loss(group)
    if not most < len(losses) <= max(group.width, most) + 1:
        # A score may say what comes after the last one that may go.
        raise ArgumentError(
            f"the cost curve of '{group.name}' goes up to {len(losses) - 1} channel sets of a block, of which"
            f" {most} may go here; measure with the granularity= and include= of the pruning"
        )
    counts = np.array(_counts(group, round_to))
    return counts, losses[counts]


def _counts(group: Group, round_to: int) -> list[int]:
    """How many channel sets of a block can go."""
    return [
        0,
        *(
            count
            for count in range(1, deepest_loss(group) + 1)
            if (group.width - count) % group.step(round_to) == 0
        ),
    ]


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
        places = [0] * len(curves)
        for _, index, _, last in moves[:count]:
            places[index] = last
        if part is not None:
            places[moves[count][1]] = part
        return [int(counts[place]) for (counts, _), place in zip(curves, places, strict=True)]

    low, high = 0, len(moves)  # after `low` moves too little is gone, after `high` enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if budget.over(after(middle)) > 0 else (low, middle)
    if not moves:
        return after(0)
    _, _, first, last = moves[low]
    return budget.closest(after(low, place) for place in range(first, last + 1))


def _given_back(
    budget: Budget, round_to: int, lost: Sequence[int], worth: Callable[[int, int, int], float]
) -> list[int]:
    """Leave channel sets where they are as long as the budget is met without, step by step.

    Args:
        worth: of giving back one step: the place of the group, and what it loses before and after; the
            largest goes first.
    """
    given, counts = list(lost), [_counts(group, round_to) for group in budget.groups]
    waiting = {
        index: place for index, count in enumerate(given) if (place := bisect_left(counts[index], count))
    }
    while waiting:
        index = max(waiting, key=lambda index: worth(index, given[index], counts[index][waiting[index] - 1]))
        place = waiting.pop(index) - 1
        fewer = [*given[:index], counts[index][place], *given[index + 1 :]]
        if budget.over(fewer) <= 0:
            given = fewer
            if place:
                waiting[index] = place
    return given


def _polished(budget: Budget, round_to: int, costs: Costs, lost: list[int]) -> list[int]:
    """Give back what need not go, and exchange steps where much is left over all the same."""

    def saved(index: int, before: int, after: int) -> float:
        losses = costs[budget.groups[index].name].losses
        return float(losses[before] - losses[after])

    best = _given_back(budget, round_to, lost, saved)
    least = _predicted(budget, costs, best)
    coarse = FINE * min(1 - limit.need for limit in budget.limits)
    improved = True
    while improved and budget.over(best) < -coarse:
        improved = False
        for index, group in enumerate(budget.groups):
            counts = [
                count
                for count in _counts(group, round_to)
                if best[index] < count < len(costs[group.name].losses)
            ]
            if counts:
                other = _given_back(budget, round_to, [*best[:index], counts[0], *best[index + 1 :]], saved)
                predicted = _predicted(budget, costs, other)
                if predicted < least and budget.over(other) <= 0:
                    best, least, improved = other, predicted, True
    return best


def _predicted(budget: Budget, costs: Costs, lost: Sequence[int]) -> float:
    return costs.predicted({group.name: count for group, count in zip(budget.groups, lost, strict=True)})


class TrialAllocation(CostAllocation):
    """An allocation that tries what it thinks of on calibration sequences, beside the cost curves.

    Attributes:
        sequences: on how many at most.
    """

    sequences: int = 8

    def start(self, budget: Budget, round_to: int, costs: Costs) -> list[int]:
        """An allocation by the cost curves alone, which also finds out whether they serve the budget before
        anything is tried.
        """
        return Global()(budget, round_to, costs)

    @abstractmethod
    def __call__(self, budget: Budget, round_to: int, costs: Costs, trial: Trial | None = None) -> list[int]:
        """The channel sets that each block of each of the budget's groups loses; by the cost curves alone
        where nothing can be tried.
        """


class Search(TrialAllocation):
    """An evolutionary search from what :class:`Global` finds, judged by running the pruned model.

    Cost curves are of single groups and to second order; what removals of many groups do to the whole model
    is found out by doing it. In each generation some candidates are drawn from the best allocation so far:
    one to three pairs of groups exchange steps of equal cost, one of the pair losing more, the other as much
    less as gives the budget back. Steps begin with up to an eighth of a group and end with up to a
    sixty-fourth, or single ones. All candidates are run on one sequence, the best third of them on two, and
    so on; the last takes the place of the best so far where its loss over all sequences is less, so that the
    search never ends worse there than it began. Evolutionary searches over what layers lose: EvoPress
    (Sieberling et al., arXiv 2410.14649), DarwinLM (Tang et al., 2502.07780) and Týr-the-Pruner (Li et al.,
    2503.09657).

    A candidate is run as the dense model with other weights: of each group, the first channel sets of one
    order go that was found on the dense model, and what reads them is repaired in closed form on the dense
    model's activations, with the ridge of :class:`fasp_fx.obs.OBS`. What is removed in the end is chosen and
    repaired behind earlier removals, as always. Where removed channels cross a norm
    (``include=("approximate",)``) or experts go, norms and routers of a candidate still see the dense
    model's, as they do while a model is calibrated.

    The loss is, with ``loss="next-token"``, the mean over tokens of the Kullback-Leibler divergence KL(dense
    ‖ pruned) of the next token, over the 64 tokens that the dense model thinks most likely and all others as
    one; with ``"outputs"`` or without a loss, half the mean squared error of the outputs, relative to their
    mean square; otherwise the mean of the terms of the caller's loss. Padding does not count; sequences count
    alike.

    Groups that no weight reads cannot be tried, and are refused. A model is searched that is captured whole;
    plain checkpoints and models pruned by their submodules are not.

    Args:
        generations: how many times candidates are drawn.
        offspring: how many are drawn at a time.
        sequences: on how many calibration sequences candidates are judged, taken evenly from all of them;
            with a loss of the caller's, whole batches.
        seed: of what is drawn. The caller's random numbers go on as if nothing had been.

    Raises:
        ArgumentError: one of them is no positive integer, or the seed none from 0 on.
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

    def check(self, budget: Budget, round_to: int) -> None:
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

    def __call__(self, budget: Budget, round_to: int, costs: Costs, trial: Trial | None = None) -> list[int]:
        """Channel sets lost per block of each group; arguments and errors as for :class:`Global`.

        Args:
            trial: runs candidates; without one, what the search would begin with.
        """
        start = self.start(budget, round_to, costs)
        if trial is None:
            return start
        exchanges = Exchanges(budget, [_counts(group, round_to) for group in budget.groups], start)
        found = evolve(exchanges, start, trial, self.generations, self.offspring, self.seed)
        trial.note(found.first, found.loss, found.tried)
        return found.lost
