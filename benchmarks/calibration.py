"""Perplexity of SmolLM2-135M after pruning by what text calibrated it: how much of WikiText-2, or texts that
the model wrote, and how. Resumes where it was stopped.

A recipe is ``COUNTxLENGTH,wiki`` for WikiText-2, or ``COUNTxLENGTH,TEMPERATURE,TOP_P,BEGINNING`` for texts of
the model: one begins with ``bos``, with ``eos`` (which parts documents), or with a ``random`` token.
"""

from __future__ import annotations

import pathlib
import warnings
from typing import Any

import torch
from _protocol import EVALUATION, LENGTH, Results, arguments, chunks, smollm2, timed
from torch import Tensor

import fasp_fx
from fasp_fx.hf import perplexity


def write(model: Any, recipe: str, seed: int, folder: pathlib.Path) -> Tensor:
    """Texts by a recipe, kept in a folder; says how many seconds they took."""
    from transformers import GenerationConfig

    file = folder / f"{recipe}-{seed}.pt"
    if file.exists():
        return torch.load(file)["tokens"]
    size, temperature, top_p, beginning = recipe.split(",")
    count, length = map(int, size.split("x"))
    torch.manual_seed(seed)
    first = {"bos": model.config.bos_token_id, "eos": 0}.get(beginning)
    prompt = torch.full((count, 1), 0 if first is None else first)
    prompt = torch.randint(model.config.vocab_size, (count, 1)) if first is None else prompt
    sampling = {"do_sample": True, "temperature": float(temperature), "top_k": 0, "top_p": float(top_p)}
    model.generation_config = GenerationConfig(
        **sampling, max_length=length, eos_token_id=None, pad_token_id=0
    )
    spent, texts = timed(
        lambda: [model.generate(part, attention_mask=torch.ones_like(part)) for part in prompt.split(128)]
    )
    print(f"{recipe}: written in {spent:.0f} s", flush=True)
    torch.save({"tokens": torch.cat(texts)}, file)
    return torch.cat(texts)


def main() -> None:
    parser = arguments(__doc__, out=True)
    parser.add_argument("--recipes", nargs="+", required=True, help="what calibrates")
    parser.add_argument(
        "--measured", nargs="*", default=[], help="texts of the model's own to measure on, besides WikiText-2"
    )
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.2])
    parser.add_argument("--quality", choices=["fast", "balanced", "best"], default="balanced")
    parser.add_argument("--restore", nargs="*", default=["least-squares"], help="or none")
    options = parser.parse_args()
    warnings.simplefilter("ignore", fasp_fx.CalibrationWarning)
    options.out.mkdir(exist_ok=True)
    results = Results(options.out / "results.jsonl")
    model, tokenizer = smollm2(options.device)
    wiki = chunks(tokenizer, options.text, options.device)
    held = {recipe: write(model, recipe, 99, options.out) for recipe in options.measured}
    held["wiki"] = wiki[EVALUATION][: options.evaluation]
    combined = [
        (recipe, s, how) for recipe in options.recipes for s in options.sparsity for how in options.restore
    ]
    for recipe, sparsity, restore in [("dense", 0.0, "none"), *combined]:
        key = {"recipe": recipe, "sparsity": sparsity, "restore": restore, "measured": sorted(held)}
        key |= {"evaluation": options.evaluation, "quality": options.quality}
        if results.has(key):
            continue
        found, measured = dict(key), model
        if recipe != "dense":
            count, length = map(int, recipe.partition(",")[0].split("x"))
            tokens = wiki[: count * length // LENGTH].reshape(count, length)
            if not recipe.endswith(",wiki"):
                tokens = write(model, recipe, 0, options.out)
            result = fasp_fx.prune(
                model,
                (),
                {"input_ids": tokens[:1], "use_cache": False},
                calibration=[{"input_ids": row[None]} for row in tokens],
                held_out=(),
                sparsity=sparsity,
                restore=None if restore == "none" else restore,
                quality=options.quality,
                loss="next-token",
            )
            measured = result.module
            found |= {"reached": result.report.sparsity}
        results.add(found | {"perplexity": {name: perplexity(measured, text) for name, text in held.items()}})


if __name__ == "__main__":
    main()
