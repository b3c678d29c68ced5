"""After SlimLLM (Guo et al., 2025, arXiv 2505.22689): heads by correlation, neurons in the space of the
outputs, layers by angle.

`python slimllm.py MODEL TEXT` takes a Llama and prints perplexity after its choice, with its own repair
(every output is scaled and shifted) and with ours.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fasp_fx
from fasp_fx.allocation import deepest_loss, lost_per_block
from fasp_fx.evaluation import perplexity
from fasp_fx.scoring import GroupScore, Order, by_value


class Holistic(GroupScore):
    def __call__(self, group):
        (columns,) = group.consumers
        gram, weight, sets = columns.gram(), columns.weight.double(), columns.sets[:, 0]
        if (
            np.bincount(sets[sets >= 0]).max() == 1
        ):  # neurons: the length of W_j among the outputs' principal directions, times that of X_j
            space = weight @ gram @ weight.T
            return by_value(
                group, (columns.norms * ((space @ weight) * weight).sum(0).clamp_min(0).sqrt()).numpy()
            )
        member = torch.nn.functional.one_hot(
            torch.from_numpy(sets)
        ).double()  # heads: one goes whose loss leaves the outputs most alike
        shared = (member.T @ ((weight.T @ weight) * gram) @ member).numpy()  # what two heads give, multiplied
        kept, order = list(range(len(shared))), []
        while len(kept) > 1:
            left = [[other for other in kept if other != head] for head in kept]
            order.append(
                kept[
                    int(
                        np.argmax(
                            [
                                shared[:, some].sum() / np.sqrt(shared[np.ix_(some, some)].sum())
                                for some in left
                            ]
                        )
                    )
                ]
            )
            kept.remove(order[-1])
        return Order(np.array([[*order, *kept]]))


def by_angle(turns):  # a layer that turns its input further keeps more
    names, angles = list(turns), np.array(list(turns.values()))
    share = dict(zip(names, (angles.max() - angles) / max(np.ptp(angles), 1e-9) + 0.5, strict=True))

    def allocate(budget, round_to):
        own = [
            share[next(name for name in names if group.name.startswith(f"{name}."))]
            for group in budget.groups
        ]
        tried = [
            [
                min(lost_per_block(g.width, min(s * t, 1), round_to, g.needed), deepest_loss(g))
                for g, s in zip(budget.groups, own, strict=True)
            ]
            for t in np.linspace(0, 1, 400)
        ]
        return budget.closest(tried)

    return allocate


def by_outputs(problem):  # y is about a times what is left of it, plus b, for every output
    weight, ones, kept = problem.weight, problem.kept[-1], problem.weight[:, problem.kept]
    means, left = problem.gram[:, ones] / problem.gram[ones, ones], problem.kept
    gram = problem.gram - problem.gram[ones, ones] * means[:, None] * means
    scale = ((weight @ gram[:, left]) * kept).sum(1) / ((kept @ gram[left][:, left]) * kept).sum(1).clamp_min(
        1e-12
    )
    found = scale[:, None] * kept
    found[:, -1] = weight @ means - found @ means[left]
    return found


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", type=Path)
parser.add_argument("text", type=Path)
for name, default in {"sparsity": 0.2, "length": 1024, "chunks": 32, "after": 100, "measure": 40}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
options = parser.parse_args()
where, gguf = (
    (options.model.parent, {"gguf_file": options.model.name})
    if options.model.suffix == ".gguf"
    else (options.model, {})
)
biased = {"attention_bias": True, "mlp_bias": True}  # the shifts, zero to begin with
tokenizer, dense = (
    AutoTokenizer.from_pretrained(where, **gguf),
    AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **biased, **gguf).eval(),
)
ids = torch.tensor(
    tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
)
chunks = ids[: len(ids) // options.length * options.length].view(-1, options.length)
calls = [{"input_ids": chunk[None], "use_cache": False} for chunk in chunks[: options.chunks]]
with torch.no_grad():
    states = dense.model(**calls[0], output_hidden_states=True).hidden_states
turns = {
    f"model.layers.{i}": float(1 - torch.cosine_similarity(a, b, -1).mean())
    for i, (a, b) in enumerate(pairwise(states))
}
captured, measured = fasp_fx.capture(dense, (), calls[0]), chunks[options.after :][: options.measure]
for name, restore in {"SlimLLM": by_outputs, "SlimLLM, repaired": "least-squares"}.items():
    own = {
        "score": Holistic(),
        "allocation": by_angle(turns),
        "granularity": ("head", "channel"),
        "restore": restore,
    }
    result = fasp_fx.prune(captured, calibration=calls, sparsity=options.sparsity, loss="next-token", **own)
    print(
        f"{name}: {result.report.sparsity:.1%} removed, perplexity {perplexity(result.module, measured):.2f}",
        flush=True,
    )
