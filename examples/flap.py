"""FLAP (An et al., 2024, arXiv 2312.11983) in the public interface: how much inputs fluctuate is the score,
one threshold serves all groups, biases make up.

`python flap.py MODEL TEXT` takes a Llama and prints perplexity after FLAP's choice, with FLAP's biases and
with our repair in their place.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fasp_fx
from fasp_fx.allocation import CostAllocation, deepest_loss
from fasp_fx.evaluation import perplexity
from fasp_fx.scoring import GroupScore, Order, by_value

SHIFT = 100.0  # a cost curve never falls, and standardised scores lie around zero: they are counted from here


class Moments:  # a statistic: sums over tokens, so that batches add up; padding has the weight 0
    needs_gradient = False

    def __init__(self, columns, device):
        self.count, self.first, self.second = (
            0.0,
            torch.zeros(columns, device=device),
            torch.zeros(columns, device=device),
        )

    def update(self, tokens, gradient, weight):
        self.count, self.first, self.second = (
            self.count + float(weight.sum()),
            self.first + weight @ tokens,
            self.second + weight @ tokens.square(),
        )


class Fluctuation(GroupScore):  # Var(X_j) ‖W_j‖² (FLAP, equation 5), standardised within the group
    def __init__(self):
        self.statistics = {"moments": Moments}

    def __call__(self, group):
        total = np.zeros(len(group.block_of))
        for columns in group.consumers:
            seen = columns.seen["moments"]
            values = (
                seen.second / seen.count - (seen.first / seen.count).square()
            ) * columns.weight.square().sum(0)
            np.add.at(total, columns.sets[:, 0], values.cpu().numpy())
        order = by_value(group, (total - total.mean()) / total.std())
        return Order(
            order.sets,
            np.concatenate(
                [[0], np.cumsum(((total - total.mean()) / total.std())[order.sets].mean(0) + SHIFT)]
            ),
        )


class Threshold(CostAllocation):  # what lies below one number goes, whatever group it is in
    def __call__(self, budget, round_to, costs):
        scores = [np.diff(costs[group.name].losses)[: deepest_loss(group)] for group in budget.groups]
        thresholds = np.quantile(np.concatenate(scores), np.linspace(0, 1, 1000))
        return budget.closest(
            [
                [int((own < threshold).sum()) // round_to * round_to for own in scores]
                for threshold in thresholds
            ]
        )


def by_bias(problem):  # what stays is left as it is, and the bias gives the mean of what goes
    found, means = (
        problem.weight[:, problem.kept].clone(),
        problem.gram[:, problem.kept[-1]] / problem.gram[problem.kept[-1], problem.kept[-1]],
    )
    found[:, -1] = problem.weight @ means - found @ means[problem.kept]
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
biased = {"attention_bias": True, "mlp_bias": True}  # FLAP adds biases, zero to begin with
tokenizer, dense = (
    AutoTokenizer.from_pretrained(where, **gguf),
    AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **biased, **gguf).eval(),
)
ids = torch.tensor(
    tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
)
chunks = ids[: len(ids) // options.length * options.length].view(-1, options.length)
calls = [{"input_ids": chunk[None], "use_cache": False} for chunk in chunks[: options.chunks]]
captured, measured = fasp_fx.capture(dense, (), calls[0]), chunks[options.after :][: options.measure]
for name, restore in {"FLAP": by_bias, "FLAP, repaired": "least-squares"}.items():
    own = {
        "score": Fluctuation(),
        "allocation": Threshold(),
        "restore": restore,
        "propagate": restore != by_bias,
    }  # FLAP observes the dense model
    result = fasp_fx.prune(captured, calibration=calls, sparsity=options.sparsity, loss="next-token", **own)
    print(
        f"{name}: {result.report.sparsity:.1%} removed, perplexity {perplexity(result.module, measured):.2f}",
        flush=True,
    )
