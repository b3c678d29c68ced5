"""What SmolLM2-135M can still do after pruning, by what it was calibrated on: nats above the dense model on
kinds of text, questions answered, last words found. Resumes where it was stopped.

A recipe joins sources by ``+``: a kind of text (the name of its file), or ``own``, what the model writes
itself. ``fiction+own`` calibrates on as many tokens of each; ``all-code`` on every kind but code, and as
much own text as of all these together. The first half of each file calibrates, the second measures. Folders
that ``fasp-fx`` wrote are measured as they are.
"""

from __future__ import annotations

import json
import pathlib
import time
import warnings
from typing import Any

import torch
from _protocol import LENGTH, Results, arguments, chunks, smollm2
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fasp_fx
from fasp_fx import hf

KINDS = {name: f"{name}.txt" for name in ("code", "fiction", "maths", "science")} | {
    "wiki": "wikitext2-valid.txt"
}
#: tokens of a text that the model writes
OWN = 256
QUESTIONS = ("arc_challenge.jsonl", "openbook_qa.jsonl")


def drawn(texts: Tensor, count: int, draw: int) -> Tensor:
    """Some chunks, others for each draw, as often as there are any."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(draw))
    return texts[order[:count]]


def sources_of(recipe: str) -> list[str]:
    """The names of the sources of a recipe."""
    if recipe.startswith("all"):
        files = [kind for kind in KINDS if kind != recipe.removeprefix("all-")]
        return [*files, *(f"own {number}" for number in range(len(files)))]
    return recipe.split("+")


def lines(file: pathlib.Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@torch.no_grad()
def log_likelihoods(model: Any, tokenizer: Any, before: str, after: list[str]) -> list[tuple[float, bool]]:
    """Of each continuation of a text its log-likelihood, and whether it is the likeliest; the text is read
    once.
    """
    begun = tokenizer(before)["input_ids"]
    rest = [torch.tensor(tokenizer(before + one)["input_ids"][len(begun) :]) for one in after]
    read = model(input_ids=torch.tensor([begun], device=model.device), use_cache=True)
    read.past_key_values.batch_repeat_interleave(len(after))
    # Padding comes behind, where nothing that counts sees it.
    rows = nn.utils.rnn.pad_sequence(rest, batch_first=True).to(model.device)
    logits = model(input_ids=rows, past_key_values=read.past_key_values).logits
    first = read.logits[:, -1:].expand(len(after), 1, -1)
    scores = torch.cat([first, logits[:, :-1]], 1).float().log_softmax(-1).cpu()
    return [
        (float(row[range(len(one)), one].sum()), bool((row[: len(one)].argmax(-1) == one).all()))
        for row, one in zip(scores, rest, strict=True)
    ]


def answers(model: Any, tokenizer: Any, questions: list[dict[str, Any]]) -> list[int]:
    """Which choice of each question is the likeliest for each of its bytes."""
    found = []
    for one in questions:
        choices = [f" {choice}" for choice in one["choices"]]
        values = log_likelihoods(model, tokenizer, one["query"], choices)
        scores = [
            value / len(choice.encode()) for (value, _), choice in zip(values, one["choices"], strict=True)
        ]
        found.append(scores.index(max(scores)))
    return found


def last_words(model: Any, tokenizer: Any, folder: pathlib.Path, count: int) -> int:
    """How many of the first passages of LAMBADA end as the model would end them."""
    return sum(
        log_likelihoods(model, tokenizer, one["context"], [f" {one['continuation']}"])[0][1]
        for one in lines(folder / "lambada_openai.jsonl")[:count]
    )


def main() -> None:
    parser = arguments(__doc__, text=False, out=True)
    parser.add_argument("--texts", type=pathlib.Path, required=True, help="the folder of the files")
    parser.add_argument("--recipes", nargs="*", default=[], help="what calibrates")
    parser.add_argument("--folders", nargs="*", default=[], help="what `fasp-fx` wrote, to measure as it is")
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.2, 0.3])
    parser.add_argument("--quality", choices=["fast", "balanced", "best"], default="balanced")
    parser.add_argument("--draw", type=int, nargs="*", default=[0])
    parser.add_argument("--chunks", type=int, default=32, help="that calibrate")
    parser.add_argument("--evaluation", type=int, default=10, help="chunks of each kind that are measured")
    parser.add_argument("--tasks", action="store_true", help="questions and last words, too")
    parser.add_argument("--code", default="", help="what this code is called in the results")
    options = parser.parse_args()
    warnings.simplefilter("ignore", fasp_fx.CalibrationWarning)
    results = Results(options.out)
    model, tokenizer = smollm2(options.device)
    whole = {kind: chunks(tokenizer, options.texts / file, options.device) for kind, file in KINDS.items()}
    halves = {kind: text.tensor_split(2) for kind, text in whole.items()}
    kept = options.out.with_suffix(".own.pt")
    measuring = {
        kind: half[torch.linspace(0, len(half) - 1, min(options.evaluation, len(half))).long()]
        for kind, (_, half) in halves.items()
    }

    def measured(smaller: nn.Module) -> dict[str, Any]:
        with torch.no_grad():
            nats = {
                kind: float(torch.tensor(hf.perplexity(smaller, text)).log())
                for kind, text in measuring.items()
            }
        if not options.tasks:
            return {"nats": nats}
        questions = [one for file in QUESTIONS for one in lines(options.texts / file)]
        chosen = answers(smaller, tokenizer, questions)
        right = sum(one["gold"] == choice for one, choice in zip(questions, chosen, strict=True))
        words = last_words(smaller, tokenizer, options.texts, 500)
        # Every choice is kept: how many are the dense model's says more than how many are right by chance.
        return {"nats": nats, "right": right, "answers": chosen, "last words": words}

    def written(draw: int) -> Tensor:
        texts = torch.load(kept) if kept.exists() else {}
        if (draw, options.chunks) not in texts:
            count = options.chunks * LENGTH // OWN
            texts[draw, options.chunks] = hf.write_texts(model, tokenizer, count, OWN, seed=draw)
            torch.save(texts, kept)
        return texts[draw, options.chunks]

    measures = {"evaluation": options.evaluation, "tasks": options.tasks}
    key = {"recipe": "dense"} | measures
    if not results.has(key):
        results.add(key | measured(model))
    for folder in options.folders:
        key = {"folder": folder} | measures
        if not results.has(key):
            smaller = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
            results.add(key | measured(smaller.to(options.device)))
    captured = None
    for draw in options.draw:
        for recipe in options.recipes:
            names = sources_of(recipe)
            each = -(-options.chunks // len(names))
            rows = each * LENGTH // OWN
            own = iter(written(draw).split(rows) if any("own" in name for name in names) else ())
            texts = {
                name: drawn(halves[name][0], each, draw) if name in halves else next(own) for name in names
            }
            costs = None
            for sparsity in options.sparsity:
                key = {"recipe": recipe, "sparsity": sparsity, "quality": options.quality, "draw": draw}
                key |= {"code": options.code, "chunks": options.chunks} | measures
                if results.has(key):
                    continue
                if captured is None:
                    captured = hf.capture(model)
                batches = {name: [{"input_ids": row[None]} for row in text] for name, text in texts.items()}
                how: dict[str, Any] = {"quality": options.quality, "calibration": batches}
                how |= {"progress": False}
                begun = time.process_time()
                if costs is None and options.quality != "fast":
                    costs = hf.measure(captured, part=None, **how)
                result = hf.prune(captured, sparsity=sparsity, costs=costs, held_out=(), **how)
                seconds = time.process_time() - begun  # of the first sparsity with its costs
                key |= {"reached": result.report.sparsity, "seconds": seconds}
                results.add(key | measured(result.model))


if __name__ == "__main__":
    main()
