"""What an encoder of sentences and a network for images lose on another domain than calibrated them.
Resumes where it was stopped.

MiniLM-L6: the mean cosine of 300 embeddings of each kind of text with the dense model's, after 512 other
sentences. A vision transformer, trained on scikit-learn's digits as they are: the accuracy on 360 of them,
plain, shifted by a pixel, noisy, dim and with a bar across, after 512 others. In the table, *other*: the mean
over single other domains; *all others*: as many inputs of all domains but the one that is measured.
"""

from __future__ import annotations

import pathlib
import re
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import sentences
import torch
import vision
from _protocol import Results, arguments
from ability import KINDS
from torch import Tensor, nn
from torch.nn import functional

import fasp_fx

CALIBRATING, MEASURED, BATCH = 512, 300, 32
#: what batches calibrate for each domain, and what measures a pruned model on it
Domain = tuple[list[Any], Callable[[nn.Module], float]]


def texts(options: Any) -> tuple[nn.Module, dict[str, Domain]]:
    """MiniLM, and sentences of 5 to 64 words of each kind: those of the first half of a file calibrate."""
    model, tokenizer = sentences.minilm(options.device)
    domains: dict[str, Domain] = {}
    for kind, file in KINDS.items():
        parts = re.split(r"(?<=[.!?:])\s+|\n", (options.texts / file).read_text("utf-8"))
        found = list(dict.fromkeys(part.strip() for part in parts if 5 <= len(part.split()) <= 64))
        halves = found[: len(found) // 2], found[len(found) // 2 :]
        some = sentences.spread(halves[0], CALIBRATING), sentences.spread(halves[1], MEASURED)
        fitted, data = (sentences.padded(tokenizer, part, BATCH, options.device) for part in some)
        dense = sentences.embed(model, data)
        domains[kind] = fitted, lambda module, dense=dense, data=data: sentences.cosine(module, dense, data)
    return model, domains


def images(options: Any) -> tuple[nn.Module, dict[str, Domain]]:
    """The vision transformer, and digits as other cameras would show them."""
    model, fitted, measured, labels = vision.digits(options.device)
    domains: dict[str, Domain] = {}
    for name, change in CHANGES.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            some, data = ([change(batch) for batch in part] for part in (fitted, measured))
        domains[name] = some, lambda module, data=data: vision.accuracy(module, data, labels)
    return model, domains


def barred(batch: Tensor) -> Tensor:
    """A dark bar across each image."""
    changed = batch.clone()
    changed[..., 3, :] = -1.0
    return changed


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda batch: batch,
    "shifted": lambda batch: functional.pad(batch, (1, -1, 0, 0), value=-1.0),
    "noisy": lambda batch: batch + 0.5 * torch.randn_like(batch),
    "dim": lambda batch: (batch + 1) / 2 - 1,
    "barred": barred,
}
SUBJECTS = {"MiniLM-L6": (texts, (0.2, 0.4)), "vision transformer": (images, (0.6, 0.7))}


def mixed(domains: dict[str, Domain], names: list[str]) -> dict[str, list[Any]]:
    """As many batches in all as one domain has, the same number of each."""
    count = len(domains[names[0]][0])
    shares = [len(part) for part in torch.arange(count).tensor_split(len(names))]
    return {name: domains[name][0][:share] for name, share in zip(names, shares, strict=True)}


def table(done: list[dict[str, Any]]) -> Iterator[str]:
    """Results in Markdown, in the mean over the domains."""
    yield "| | sparsity | `quality` | dense | itself | other | all others |\n|---|---|---|---|---|---|---|"
    cases = dict.fromkeys((one["subject"], one["sparsity"], one["quality"]) for one in done)
    for subject, sparsity, quality in cases:
        if quality == "dense":
            continue
        rows = {
            tuple(one["calibrated"]): one["found"]
            for one in done
            if (one["subject"], one["sparsity"], one["quality"]) == (subject, sparsity, quality)
        }
        dense = next(one["found"] for one in done if one["subject"] == subject and not one["calibrated"])
        other = [
            found[name] for on, found in rows.items() if len(on) == 1 for name in found if name not in on
        ]
        itself = [rows[name,][name] for name in dense]
        rest = [found[name] for on, found in rows.items() if len(on) > 1 for name in found if name not in on]
        means = (statistics.mean(some) for some in (dense.values(), itself, other, rest))
        cells = " | ".join(f"{mean:.4f}" for mean in means)
        yield f"| {subject} | {sparsity:.0%} | {quality} | {cells} |"


def main() -> None:
    parser = arguments(__doc__, text=False, out=True)
    parser.add_argument("--texts", type=pathlib.Path, required=True, help="the folder of the files of text")
    parser.add_argument("--quality", nargs="*", default=["fast", "balanced", "best"])
    options = parser.parse_args()
    warnings.simplefilter("ignore", fasp_fx.CalibrationWarning)
    results = Results(options.out)
    for subject, (make, sparsities) in SUBJECTS.items():
        model, domains = make(options)
        key: dict[str, Any] = {"subject": subject, "sparsity": 0.0, "quality": "dense", "calibrated": []}
        if not results.has(key):
            results.add(key | {"found": {name: judge(model) for name, (_, judge) in domains.items()}})
        example = next(iter(domains.values()))[0][0]
        named = {"pixel_values": example} if isinstance(example, Tensor) else example
        captured = fasp_fx.capture(model, (), named)
        names = list(domains)
        recipes = [[name] for name in names] + [[one for one in names if one != name] for name in names]
        for recipe in recipes:
            for quality in options.quality:
                how: dict[str, Any] = {"calibration": mixed(domains, recipe), "quality": quality}
                how |= {"progress": False}
                costs = None
                for sparsity in sparsities:
                    key |= {"sparsity": sparsity, "quality": quality, "calibrated": recipe}
                    if results.has(key):
                        continue
                    if costs is None and quality != "fast":
                        costs = fasp_fx.measure(captured, part=None, **how)
                    pruned = fasp_fx.prune(captured, sparsity=sparsity, costs=costs, held_out=(), **how)
                    found = {name: judge(pruned.module) for name, (_, judge) in domains.items()}
                    results.add(key | {"found": found})
    print("\n".join(table(results.done)))


if __name__ == "__main__":
    main()
