"""FLAP (An et al., 2024, arXiv 2312.11983) in the public interface: how much inputs fluctuate is the score,
one threshold serves all groups, biases make up.

`python flap.py MODEL TEXT` takes a Llama and prints perplexity after FLAP's choice, with FLAP's biases and
with our repair in their place.
"""

import numpy as np
import torch
from chunks import Comparison

from fasp_fx.allocation import CostAllocation
from fasp_fx.calibration import GroupScore, Order, by_set, by_value

SHIFT = 100.0  # a cost curve never falls, and standardised scores lie around zero: they are counted from here


class Moments:  # a statistic: sums over tokens, so that batches add up; padding has the weight 0
    needs_gradient = False

    def __init__(self, columns, device):
        self.count, self.sums = 0.0, torch.zeros(2, columns, device=device)

    def update(self, tokens, gradient, weight):
        self.count += float(weight.sum())
        self.sums += torch.stack([weight @ tokens, weight @ tokens.square()])

    def variance(self):
        first, second = self.sums / self.count
        return second - first.square()


class Fluctuation(GroupScore):  # Var(X_j) ‖W_j‖² (FLAP, equation 5), standardised within the group
    def __init__(self):
        self.statistics = {"moments": Moments}

    def __call__(self, group):
        def values(columns):
            return (columns.seen["moments"].variance() * columns.weight.square().sum(0)).cpu().numpy()

        total = by_set(group, values)
        scores = (total - total.mean()) / total.std()
        order = by_value(group, scores)
        return Order(order.sets, np.concatenate([[0], np.cumsum(scores[order.sets].mean(0) + SHIFT)]))


class Threshold(CostAllocation):  # what lies below one number goes, whatever group it is in
    def __call__(self, budget, round_to, costs):
        scores = [np.diff(costs[group.name].losses)[: group.deepest_loss] for group in budget.groups]
        thresholds = np.quantile(np.concatenate(scores), np.linspace(0, 1, 1000))
        lost = [[int((own < limit).sum()) // round_to * round_to for own in scores] for limit in thresholds]
        return budget.closest(lost)


def by_bias(problem):  # what stays is left as it is, and the bias gives the mean of what goes
    ones = problem.kept[-1]
    means = problem.gram[:, ones] / problem.gram[ones, ones]
    found = problem.weight[:, problem.kept].clone()
    found[:, -1] = problem.weight @ means - found @ means[problem.kept]
    return found


comparison = Comparison(__doc__)
choice = {"score": Fluctuation(), "allocation": Threshold()}
comparison.run("FLAP", **choice, restore=by_bias)  # FLAP observes the dense model, here the pruned one
comparison.run("FLAP, repaired", **choice)
