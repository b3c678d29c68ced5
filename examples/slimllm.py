"""After SlimLLM (Guo et al., 2025, arXiv 2505.22689): heads by correlation, neurons in the space of the
outputs, layers by angle.

`python slimllm.py MODEL TEXT` takes a Llama and prints perplexity after its choice, with its own repair
(every output is scaled and shifted) and with ours.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from chunks import Comparison
from torch import Tensor

from fasp_fx import Group
from fasp_fx.allocation import Budget, lost_per_block
from fasp_fx.calibration import GroupColumns, GroupScore, Order, Problem, by_value


class Holistic(GroupScore):
    def __call__(self, group: GroupColumns) -> Order:
        (columns,) = group.consumers
        assert columns.norms is not None
        assert columns.gram is not None  # there are data
        gram, weight, sets = columns.gram().double(), columns.weight.double(), columns.sets[:, 0]
        if np.bincount(sets[sets >= 0]).max() == 1:
            # Neurons: the length of W_j among the outputs' principal directions, times that of X_j.
            space = weight @ gram @ weight.T
            along = ((space @ weight) * weight).sum(0).clamp_min(0).sqrt()
            return by_value(group, (columns.norms * along).numpy())
        # Heads: one goes whose loss leaves the outputs most alike.
        member = torch.nn.functional.one_hot(torch.from_numpy(sets)).double()
        shared = (member.T @ ((weight.T @ weight) * gram) @ member).numpy()  # what two heads give, multiplied
        kept: list[int] = list(range(len(shared)))
        order: list[int] = []

        def alike(head: int) -> float:
            some = [other for other in kept if other != head]
            return float(shared[:, some].sum() / np.sqrt(shared[np.ix_(some, some)].sum()))

        while len(kept) > 1:
            order.append(max(kept, key=alike))
            kept.remove(order[-1])
        return Order(np.array([[*order, *kept]]))


def by_angle(turns: Mapping[str, float]) -> Callable[[Budget, int | None], list[int]]:
    """A layer that turns its input further keeps more."""
    most, spread = max(turns.values()), max(np.ptp(list(turns.values())), 1e-9)
    share = {f"{name}.": (most - turn) / spread + 0.5 for name, turn in turns.items()}

    def lost(group: Group, part: float, round_to: int | None) -> int:
        fraction = part * next(share[name] for name in share if group.name.startswith(name))
        count = lost_per_block(group.width, min(fraction, 1), group.step(round_to), group.needed)
        return min(count, group.deepest_loss)

    def allocate(budget: Budget, round_to: int | None) -> list[int]:
        parts = np.linspace(0, 1, 400)
        return budget.closest([[lost(group, part, round_to) for group in budget.groups] for part in parts])

    return allocate


def by_outputs(problem: Problem) -> Tensor:  # y is about a times what is left of it, plus b, for every output
    weight, gram, left = problem.weight, problem.gram, problem.kept
    ones = left[-1]
    kept, means = weight[:, left], gram[:, ones] / gram[ones, ones]
    gram = gram - gram[ones, ones] * means[:, None] * means
    energy = ((kept @ gram[left][:, left]) * kept).sum(1).clamp_min(1e-12)
    scaled = (((weight @ gram[:, left]) * kept).sum(1) / energy)[:, None] * kept
    scaled[:, -1] = weight @ means - scaled @ means[left]
    return scaled


comparison = Comparison(__doc__)
with torch.no_grad():
    states = comparison.dense.model(**comparison.calls[0], output_hidden_states=True).hidden_states
angles = [1 - torch.cosine_similarity(*pair, -1).mean().item() for pair in pairwise(states)]
turns = {f"model.layers.{layer}": angle for layer, angle in enumerate(angles)}
choice: dict[str, Any] = {
    "score": Holistic(),
    "allocation": by_angle(turns),
    "granularity": ("head", "channel"),
}
comparison.run("SlimLLM", **choice, restore=by_outputs)
comparison.run("SlimLLM, repaired", **choice)
