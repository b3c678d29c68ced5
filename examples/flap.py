"""FLAP (An et al., 2024, arXiv 2312.11983) in the public interface: how much inputs fluctuate is the score,
one threshold serves all groups, biases make up.

`python flap.py MODEL TEXT` takes a Llama and prints perplexity after FLAP's choice, with FLAP's biases and
with our repair in their place.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from chunks import Comparison
from torch import Tensor

from fasp_fx.allocation import Budget, CostAllocation, Costs
from fasp_fx.calibration import Columns, GroupColumns, GroupScore, Order, Problem, by_set, by_value

SHIFT = 100.0  # a cost curve never falls, and standardised scores lie around zero: they are counted from here


class Moments:  # a statistic: sums over tokens, so that batches add up; padding has the weight 0
    needs_gradient: ClassVar[bool] = False

    def __init__(self, columns: int, device: torch.device) -> None:
        self.count, self.sums = 0.0, torch.zeros(2, columns, device=device)

    def update(self, tokens: Tensor, gradient: Tensor | None, weight: Tensor) -> None:
        self.count += float(weight.sum())
        self.sums += torch.stack([weight @ tokens, weight @ tokens.square()])

    def variance(self) -> Tensor:
        first, second = self.sums / self.count
        variance: Tensor = second - first.square()
        return variance


class Fluctuation(GroupScore):  # Var(X_j) ‖W_j‖² (FLAP, equation 5), standardised within the group
    statistics: ClassVar = {"moments": Moments}

    def __call__(self, group: GroupColumns) -> Order:
        def values(columns: Columns) -> np.ndarray:
            moments: Any = columns.seen["moments"]
            scores: np.ndarray = (moments.variance() * columns.weight.square().sum(0)).cpu().numpy()
            return scores

        total = by_set(group, values)
        scores = (total - total.mean()) / total.std()
        order = by_value(group, scores)
        return Order(order.sets, np.concatenate([[0], np.cumsum(scores[order.sets].mean(0) + SHIFT)]))


class Threshold(CostAllocation):  # what lies below one number goes, whatever group it is in
    def __call__(self, budget: Budget, round_to: int | None, costs: Costs) -> list[int]:
        scores = [np.diff(costs[group.name].losses)[: group.deepest_loss] for group in budget.groups]
        thresholds = np.quantile(np.concatenate(scores), np.linspace(0, 1, 1000))
        steps = [group.step(round_to) for group in budget.groups]
        lost = [
            [int((each < limit).sum()) // step * step for each, step in zip(scores, steps, strict=True)]
            for limit in thresholds
        ]
        return budget.closest(lost)


def by_bias(
    problem: Problem,
) -> Tensor:  # what stays is left as it is, and the bias gives the mean of what goes
    ones = problem.kept[-1]
    means = problem.gram[:, ones] / problem.gram[ones, ones]
    kept = problem.weight[:, problem.kept].clone()
    kept[:, -1] = problem.weight @ means - kept @ means[problem.kept]
    return kept


comparison = Comparison(__doc__)
choice: dict[str, Any] = {"score": Fluctuation(), "allocation": Threshold()}
comparison.run("FLAP", **choice, restore=by_bias)  # FLAP observes the dense model, here the pruned one
comparison.run("FLAP, repaired", **choice)
