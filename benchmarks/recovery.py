"""What distillation brings back, on the models of choosing.py and on a ResNet-50 with weights at random.
Resumes where it was stopped.

A recipe is EPOCHS,LEARNING_RATE,CHUNKS,LENGTH[,TRAIN][,own][,PARTS][,OPTION=NUMBER …]: how often over how
many calibration chunks (for the others: batches), how many tokens of each, what is trained, whether SmolLM2
writes the chunks itself, whether each is two, four or eight texts ("halves", …), and options of distil; the
chunks that measure are left out. Each pruning is saved once under --out, and every recipe starts from there.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
from _protocol import EVALUATION, Results, chunks, smollm2, timed
from calibration import write
from choosing import MODELS, options_of, parser

import fasp_fx

PARTS = {"halves": 2, "quarters": 4, "eighths": 8}
RECIPES = ("1,3e-5,32,512", "2,3e-5,32,512", "2,3e-5,32,1024", "2,3e-5,96,1024")


def batches_of(recipe: str, calibration: list[Any], model: Any, options: Any) -> list[Any]:
    """What a recipe trains on."""
    _, _, count, length, *more = recipe.split(",")
    if "input_ids" not in calibration[0] or "attention_mask" in calibration[0]:
        return calibration[: int(count)]
    rows = [batch["input_ids"][0, : int(length)] for batch in calibration[: int(count)]]
    if "own" in more:
        rows = list(write(model, f"{count}x{length},1,1,bos", 0, options.out))
    parts = next((PARTS[word] for word in more if word in PARTS), 1)
    return [{"input_ids": row.reshape(parts, -1)} for row in rows]


def main() -> None:
    own_parser = parser(__doc__, ["smollm2"])
    own_parser.set_defaults(methods=["fast", "balanced", "best"], sparsity=[0.1, 0.2, 0.3])
    own_parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    options = own_parser.parse_args()
    warnings.simplefilter("ignore", fasp_fx.CalibrationWarning)
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "results.jsonl")
    for name in options.models:
        model, example, calibration, measure, own = MODELS[name](options)
        material, loss = calibration, "outputs"
        if name == "smollm2":
            text = chunks(smollm2(options.device)[1], options.text, options.device)
            text = torch.cat([text[: EVALUATION.start], text[EVALUATION.stop :]])
            material, loss = [{"input_ids": row[None]} for row in text], "divergence"
            calibration = material[: options.chunks]
        for sparsity, method, recipe in (
            (s, m, r) for s in options.sparsity for m in options.methods for r in ("none", *options.recipes)
        ):
            found: dict[str, Any] = {"model": name, "method": method, "sparsity": sparsity, "recipe": recipe}
            found |= {"chunks": options.chunks, "evaluation": options.evaluation, "limit": options.limit}
            found["tasks"] = sorted(map(str, options.tasks))
            if results.has(found):
                continue
            folder = options.out / f"{name}-{method}-{sparsity:g}-{options.chunks}"
            if not folder.exists():
                how = {"calibration": calibration, "sparsity": sparsity, **options_of(method), **own}
                found["pruning"], made = timed(fasp_fx.prune, model, (), example, **how)
                made.save(folder)
            result = fasp_fx.load(folder)
            if recipe != "none":
                epochs, rate, _, _, *more = recipe.split(",")
                how = {"epochs": int(epochs), "learning_rate": float(rate), "loss": loss}
                how |= {key: json.loads(value) for key, _, value in (w.partition("=") for w in more) if value}
                trained = [word for word in more if word not in ("own", *PARTS) and "=" not in word]
                how |= {"train": trained[0]} if trained else {}
                batches = batches_of(recipe, material, model, options)
                found["distilling"], result = timed(fasp_fx.distil, result, model, batches, **how)
                recovery = result.report.recovery
                found["curve"] = [round(point.held_out, 5) for point in recovery.curve]
                found["kept"] = recovery.kept
            results.add(found | measure(result.module))


if __name__ == "__main__":
    main()
