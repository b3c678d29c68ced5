"""Perplexity of SmolLM2-135M after FASP by how the text was written that calibrated it. Resumes where it was
stopped.

A recipe is ``COUNTxLENGTH,TEMPERATURE,TOP_P,BEGINNING``: a text begins with ``bos``, with ``eos`` (which
parts documents), or with a ``random`` token of the vocabulary; or ``COUNTxLENGTH,wiki`` for WikiText-2
itself.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
import warnings
from typing import Any

import torch
from _protocol import EVALUATION, LENGTH, chunks, smollm2
from fasp_fx.evaluation import perplexity
from torch import Tensor

import fasp_fx


def write(model: Any, tokenizer: Any, recipe: str, seed: int, folder: pathlib.Path) -> tuple[Tensor, float]:
    """Texts by a recipe, kept in a folder, and the seconds that they took."""
    from transformers import GenerationConfig

    file = folder / f"{recipe}-{seed}.pt"
    if file.exists():
        kept = torch.load(file)
        return kept["tokens"], kept["seconds"]
    size, temperature, top_p, beginning = recipe.split(",")
    count, length = map(int, size.split("x"))
    torch.manual_seed(seed)
    first = {"bos": tokenizer.bos_token_id, "eos": 0}.get(beginning)
    prompt = torch.full((count, 1), first) if first is not None else torch.randint(len(tokenizer), (count, 1))
    settings = GenerationConfig(
        do_sample=True,
        temperature=float(temperature),
        top_k=0,
        top_p=float(top_p),
        max_length=length,
        eos_token_id=None,
        pad_token_id=0,
    )
    model.generation_config = settings
    started = time.perf_counter()
    with torch.no_grad():
        tokens = torch.cat(
            [model.generate(part, attention_mask=torch.ones_like(part)) for part in prompt.split(128)]
        )
    seconds = time.perf_counter() - started
    torch.save({"tokens": tokens, "seconds": seconds}, file)
    return tokens, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", type=pathlib.Path, required=True, help="WikiText-2 validation text (wikitext2-valid.txt)"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        required=True,
        help="folder of results; what is there is not measured again",
    )
    parser.add_argument("--recipes", nargs="+", required=True, help="what calibrates")
    parser.add_argument(
        "--measured",
        nargs="*",
        default=["16x256,1,1,bos"],
        help="texts of the model's own to measure on, besides WikiText-2",
    )
    parser.add_argument(
        "--evaluation", type=int, default=40, help="chunks of WikiText-2 that are measured, from the 100th on"
    )
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--quality", choices=["fast", "balanced", "best"], default="balanced")
    options = parser.parse_args()
    warnings.simplefilter("ignore", fasp_fx.CalibrationWarning)
    options.out.mkdir(exist_ok=True)
    results = options.out / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    model, tokenizer = smollm2("cpu")
    wiki = chunks(tokenizer, options.text, "cpu")
    held = {"wiki": wiki[EVALUATION][: options.evaluation]} | {
        recipe: write(model, tokenizer, recipe, 99, options.out)[0] for recipe in options.measured
    }
    for recipe in ["dense", *options.recipes]:
        key = {
            "recipe": recipe,
            "sparsity": options.sparsity,
            "evaluation": options.evaluation,
            "measured": sorted(held),
            "quality": options.quality,
        }
        if any(key.items() <= found.items() for found in done):
            continue
        found: dict[str, Any] = dict(key)
        measured: Any = model
        if recipe != "dense":
            if recipe.endswith(",wiki"):
                count, length = map(int, recipe.removesuffix(",wiki").split("x"))
                tokens, found["writing"] = wiki[: count * length // LENGTH].reshape(count, length), 0.0
            else:
                tokens, found["writing"] = write(model, tokenizer, recipe, 0, options.out)
            batches = [{"input_ids": row[None]} for row in tokens]
            how: Any = {"sparsity": options.sparsity, "quality": options.quality, "loss": "next-token"}
            result = fasp_fx.prune(
                model, (), {"input_ids": tokens[:1], "use_cache": False}, calibration=batches, **how
            )
            measured, found["seconds"] = result.module, dict(result.report.seconds)
        found["perplexity"] = {name: perplexity(measured, text) for name, text in held.items()}
        with results.open("a") as out:
            out.write(json.dumps(found) + "\n")
        print(found, flush=True)


if __name__ == "__main__":
    main()
