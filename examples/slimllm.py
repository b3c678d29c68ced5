"""After SlimLLM (Guo et al., 2025, arXiv 2505.22689): heads by correlation, neurons in the space of the
outputs, layers by angle.

`python slimllm.py MODEL TEXT` takes a Llama and prints perplexity after its choice, with its own repair
(every output is scaled and shifted) and with ours.
"""

from itertools import pairwise

import numpy as np
import torch
from chunks import Comparison

from fasp_fx.allocation import lost_per_block
from fasp_fx.calibration import GroupScore, Order, by_value


class Holistic(GroupScore):
    def __call__(self, group):
        (columns,) = group.consumers
        gram, weight, sets = columns.gram().double(), columns.weight.double(), columns.sets[:, 0]
        if np.bincount(sets[sets >= 0]).max() == 1:
            # Neurons: the length of W_j among the outputs' principal directions, times that of X_j.
            space = weight @ gram @ weight.T
            along = ((space @ weight) * weight).sum(0).clamp_min(0).sqrt()
            return by_value(group, (columns.norms * along).numpy())
        # Heads: one goes whose loss leaves the outputs most alike.
        member = torch.nn.functional.one_hot(torch.from_numpy(sets)).double()
        shared = (member.T @ ((weight.T @ weight) * gram) @ member).numpy()  # what two heads give, multiplied
        kept, order = list(range(len(shared))), []

        def alike(head):
            some = [other for other in kept if other != head]
            return shared[:, some].sum() / np.sqrt(shared[np.ix_(some, some)].sum())

        while len(kept) > 1:
            order.append(max(kept, key=alike))
            kept.remove(order[-1])
        return Order(np.array([[*order, *kept]]))


def by_angle(turns):  # a layer that turns its input further keeps more
    most, spread = max(turns.values()), max(np.ptp(list(turns.values())), 1e-9)
    share = {f"{name}.": (most - turn) / spread + 0.5 for name, turn in turns.items()}

    def lost(group, part, round_to):
        own = next(share[name] for name in share if group.name.startswith(name))
        return min(
            lost_per_block(group.width, min(own * part, 1), round_to, group.needed), group.deepest_loss
        )

    def allocate(budget, round_to):
        parts = np.linspace(0, 1, 400)
        return budget.closest([[lost(group, part, round_to) for group in budget.groups] for part in parts])

    return allocate


def by_outputs(problem):  # y is about a times what is left of it, plus b, for every output
    weight, ones, left = problem.weight, problem.kept[-1], problem.kept
    kept, means = weight[:, left], problem.gram[:, ones] / problem.gram[ones, ones]
    gram = problem.gram - problem.gram[ones, ones] * means[:, None] * means
    energy = ((kept @ gram[left][:, left]) * kept).sum(1).clamp_min(1e-12)
    found = (((weight @ gram[:, left]) * kept).sum(1) / energy)[:, None] * kept
    found[:, -1] = weight @ means - found @ means[left]
    return found


comparison = Comparison(__doc__)
with torch.no_grad():
    states = comparison.dense.model(**comparison.calls[0], output_hidden_states=True).hidden_states
angles = [1 - torch.cosine_similarity(*pair, -1).mean().item() for pair in pairwise(states)]
turns = {f"model.layers.{layer}": angle for layer, angle in enumerate(angles)}
choice = {"score": Holistic(), "allocation": by_angle(turns), "granularity": ("head", "channel")}
comparison.run("SlimLLM", **choice, restore=by_outputs)
comparison.run("SlimLLM, repaired", **choice)
